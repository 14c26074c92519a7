//! Standard output, standard error and the question to the person in front.
//!
//! Answers go to `out`, everything else to `err`. No command writes elsewhere.

use std::io::{self, BufRead as _, IsTerminal as _, Write};

/// Where a command writes and asks.
pub struct Console {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    ask: Option<Box<dyn FnMut() -> io::Result<String>>>,
    color: bool,
}

/// Emphasis of a piece of text, shown only on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emphasis {
    /// Headings.
    Bold,
    /// Good.
    Green,
    /// Look at this.
    Yellow,
    /// Wrong.
    Red,
}

impl Console {
    /// The console of this process; it asks only when both ends are a terminal.
    pub fn of_process() -> Self {
        let interactive = io::stdin().is_terminal() && io::stderr().is_terminal();
        // https://no-color.org: present and not empty means none.
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
            ask: interactive.then(|| Box::new(read_line) as Box<dyn FnMut() -> io::Result<String>>),
            color: !plain && io::stdout().is_terminal() && io::stderr().is_terminal(),
        }
    }

    /// A console for tests and other programs; `ask` is `None` without a person.
    pub fn new(
        out: Box<dyn Write>,
        err: Box<dyn Write>,
        ask: Option<Box<dyn FnMut() -> io::Result<String>>>,
    ) -> Self {
        Self { out, err, ask, color: false }
    }

    /// Whether somebody can be asked.
    pub fn can_ask(&self) -> bool {
        self.ask.is_some()
    }

    /// Prints a line of the answer.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn print(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "{text}")?;
        self.out.flush()
    }

    /// Prints bytes of the answer as they are.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn print_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.out.flush()
    }

    /// Tells something that is not the answer. Nothing is left to do if that fails.
    pub fn tell(&mut self, text: &str) {
        _ = writeln!(self.err, "{text}");
    }

    /// Warns.
    pub fn warn(&mut self, text: &str) {
        let label = self.emphasise("warning:", Emphasis::Yellow);
        self.tell(&format!("{label} {}", clean(text)));
    }

    /// Says what failed.
    pub fn complain(&mut self, text: &str) {
        let label = self.emphasise("kmsctl:", Emphasis::Red);
        self.tell(&format!("{label} {}", clean(text)));
    }

    /// Asks and reads one line; `None` when nobody is there.
    ///
    /// # Errors
    /// When the terminal cannot be read.
    pub fn ask(&mut self, question: &str) -> io::Result<Option<String>> {
        let Some(ask) = &mut self.ask else { return Ok(None) };
        write!(self.err, "{question} ")?;
        self.err.flush()?;
        Ok(Some(ask()?.trim().to_owned()))
    }

    /// Wraps a text in the escape codes of an emphasis, on a terminal.
    pub fn emphasise(&self, text: &str, emphasis: Emphasis) -> String {
        if !self.color {
            return text.to_owned();
        }
        let code = match emphasis {
            Emphasis::Bold => "1",
            Emphasis::Green => "32",
            Emphasis::Yellow => "33",
            Emphasis::Red => "31",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }

    /// Clears the screen, on a terminal.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn clear(&mut self) -> io::Result<()> {
        if self.color { self.print_raw(b"\x1b[H\x1b[2J") } else { Ok(()) }
    }
}

fn read_line() -> io::Result<String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line)
}

/// Replaces control characters: what a server or a file says must not steer the terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_from_outside_cannot_steer_the_terminal() {
        assert_eq!(clean("a\u{1b}[2Jb\r\nc"), "a\u{fffd}[2Jb\u{fffd}\nc");
    }

    #[test]
    fn without_a_terminal_there_is_no_escape_code_and_no_question() {
        let mut console = Console::new(Box::new(io::sink()), Box::new(io::sink()), None);
        assert_eq!(console.emphasise("x", Emphasis::Red), "x");
        assert_eq!(console.ask("sure?").unwrap(), None);
    }
}
