//! Real programs as child processes.
//!
//! A child never outlives the test process: it is killed when its handle drops, and by the kernel when the test
//! process dies without dropping anything.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child as StdChild, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::wait;

/// How long a program may take to leave after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How much of a log an error message repeats.
const LOG_TAIL_LINES: usize = 30;

/// What to start: kept, so that the same program can be started again.
#[derive(Clone, Debug)]
pub struct Spec {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    log_dir: PathBuf,
}

impl Spec {
    /// A program whose output goes to `<log_dir>/<name>.stdout` and `.stderr`.
    pub fn new(name: &str, program: &Path, log_dir: &Path) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            log_dir: log_dir.to_owned(),
        }
    }

    /// Starts another program instead, with the same arguments.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// Starts it as another user, which only root can do.
    #[must_use]
    pub fn as_user(mut self, uid: u32, gid: u32) -> Self {
        // A change of user loses the wish to die with the parent; setpriv makes it anew.
        let mut args: Vec<OsString> = [
            "--clear-groups",
            "--pdeathsig",
            "KILL",
            "--reuid",
            &uid.to_string(),
            "--regid",
            &gid.to_string(),
        ]
        .map(OsString::from)
        .into();
        args.push(self.program.into());
        args.append(&mut self.args);
        Self { program: "setpriv".into(), args, ..self }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets one variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts it. The logs of an earlier start are kept and appended to.
    ///
    /// # Errors
    /// When the program or its log files cannot be opened.
    pub fn start(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(self.log("stdout")?)
            .stderr(self.log("stderr")?);
        let process =
            spawn(command).with_context(|| format!("starting {} ({})", self.name, self.program.display()))?;
        Ok(Child { spec: self.clone(), process })
    }

    /// Where its standard output goes.
    pub fn stdout_path(&self) -> PathBuf {
        self.log_dir.join(format!("{}.stdout", self.name))
    }

    /// Where its standard error goes.
    pub fn stderr_path(&self) -> PathBuf {
        self.log_dir.join(format!("{}.stderr", self.name))
    }

    fn log(&self, stream: &str) -> anyhow::Result<File> {
        fs::create_dir_all(&self.log_dir)?;
        let path = self.log_dir.join(format!("{}.{stream}", self.name));
        File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())
    }
}

/// A running program, killed when dropped.
pub struct Child {
    spec: Spec,
    process: StdChild,
}

impl Child {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// All that it wrote to standard output so far.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn stdout(&self) -> anyhow::Result<String> {
        read_log(&self.spec.stdout_path())
    }

    /// All that it wrote to standard error so far.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn stderr(&self) -> anyhow::Result<String> {
        read_log(&self.spec.stderr_path())
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.process.try_wait()?.is_none())
    }

    /// Waits until `ready` gives a value.
    ///
    /// # Errors
    /// When the program ends first or the limit passes, with the end of its log.
    pub fn wait_ready<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> anyhow::Result<T> {
        let name = self.spec.name.clone();
        wait::until(&format!("{name}: {what}"), limit, || {
            if let Some(found) = ready() {
                return Ok(Some(found));
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("{name} ended with {status} before {what}");
            }
            Ok(None)
        })
        .with_context(|| self.log_tail())
    }

    /// Waits for a line that contains `text`, in either stream, and returns it.
    ///
    /// # Errors
    /// As [`Child::wait_ready`].
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> anyhow::Result<String> {
        let (stdout, stderr) = (self.spec.stdout_path(), self.spec.stderr_path());
        self.wait_ready(&format!("a line with {text:?}"), limit, || {
            [&stdout, &stderr]
                .into_iter()
                .filter_map(|path| read_log(path).ok())
                .find_map(|log| log.lines().find(|line| line.contains(text)).map(str::to_owned))
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).context("a process id")?;
        kill_process(pid, signal).with_context(|| format!("signalling {}", self.spec.name))
    }

    /// Kills it as a crash would, with no chance to tidy up.
    ///
    /// # Errors
    /// When it was gone already.
    pub fn kill9(mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time, with the end of its log.
    pub fn stop(mut self) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_exit(STOP_LIMIT)
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it does not end in time, with the end of its log.
    pub fn wait_exit(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("{} to end", self.spec.name);
        wait::until(&what, limit, || Ok(self.process.try_wait()?)).with_context(|| self.log_tail())
    }

    fn log_tail(&self) -> String {
        let log = [self.spec.stdout_path(), self.spec.stderr_path()]
            .iter()
            .filter_map(|path| read_log(path).ok())
            .collect::<String>();
        let lines: Vec<&str> = log.lines().collect();
        let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
        let tail: Vec<&str> = lines.into_iter().skip(skipped).collect();
        format!("the end of the log of {}:\n{}", self.spec.name, tail.join("\n"))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a program to its end and returns what it wrote to standard output.
///
/// # Errors
/// When it cannot be started or ends with another status than 0; then with both streams in the text.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}:\n{stdout}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(stdout)
}

fn read_log(path: &Path) -> anyhow::Result<String> {
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

type SpawnRequest = (Command, mpsc::Sender<io::Result<StdChild>>);

/// Starts all children from one thread that never ends: "death of the parent" means to Linux the death of the thread
/// that forked, and the test runner ends a thread with each test, while a shared peer has to live on.
static SPAWNER: LazyLock<Mutex<mpsc::Sender<SpawnRequest>>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<SpawnRequest>();
    thread::spawn(move || {
        for (mut command, answer) in receiver {
            // A caller that went away has no use for the child, and dropping it would leave it running.
            if let Err(mpsc::SendError(Ok(mut orphan))) = answer.send(command.spawn()) {
                let _ = orphan.kill();
            }
        }
    });
    Mutex::new(sender)
});

#[allow(unsafe_code, reason = "pre_exec is the only way to set the parent death signal")]
fn spawn(mut command: Command) -> anyhow::Result<StdChild> {
    // SAFETY: the closure runs between fork and exec and makes one system call; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from));
    }
    let (sender, receiver) = mpsc::channel();
    SPAWNER
        .lock()
        .ok()
        .and_then(|spawner| spawner.send((command, sender)).ok())
        .context("the spawner thread is gone")?;
    Ok(receiver.recv()??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(dir: &Path, script: &str) -> Spec {
        Spec::new("shell", Path::new("/bin/sh"), dir).args(["-c", script])
    }

    #[test]
    fn a_line_is_waited_for_in_both_streams() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell(dir.path(), "echo to out; echo to err >&2; sleep 60").start().unwrap();
        assert_eq!(child.wait_for_line("to out", wait::START_LIMIT).unwrap(), "to out");
        assert_eq!(child.wait_for_line("to err", wait::START_LIMIT).unwrap(), "to err");
        assert!(child.is_running().unwrap());
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell(dir.path(), "echo port taken >&2; exit 7").start().unwrap();
        let error = format!("{:?}", child.wait_for_line("ready", wait::START_LIMIT).unwrap_err());
        assert!(error.contains("exit status: 7") && error.contains("port taken"), "{error}");
    }

    #[test]
    fn a_child_outlives_the_thread_that_started_it_and_dies_with_its_handle() {
        let dir = tempfile::tempdir().unwrap();
        let spec = shell(dir.path(), "sleep 60");
        let mut child = thread::spawn(move || spec.start().unwrap()).join().unwrap();
        assert!(child.is_running().unwrap());

        let pid = Pid::from_raw(i32::try_from(child.pid()).unwrap()).unwrap();
        drop(child);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }
}
