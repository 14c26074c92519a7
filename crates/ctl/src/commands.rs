//! Runs one command: opens the link when the command first needs it, and
//! turns the outcome into text and exit code.

mod admin;
mod audit;
mod ca;
mod changes;
mod cluster;
mod context;
mod generate;
mod key;
mod node;
mod slot;
mod status;
mod worker;

use std::io;
use std::time::SystemTime;

use serde::Serialize;

use fleet_kms_process::clock;

use crate::cli::{Cli, Format, Global, Noun};
use crate::client::Client;
use crate::client::link::Link;
use crate::console::Console;
use crate::contexts::{Context, Contexts};
use crate::failure::{Exit, Failure};
use crate::output;
use crate::progress::Progress;

/// Runs a command and answers its exit code.
pub async fn run(cli: Cli, console: &mut Console) -> u8 {
    let outcome = dispatch(cli, console).await;
    match outcome {
        Ok(()) => Exit::Ok as u8,
        // `kmsctl … | head` is no failure of ours.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Ok as u8,
        Err(failure) => {
            failure.report(console);
            failure.exit() as u8
        }
    }
}

async fn dispatch(cli: Cli, console: &mut Console) -> Result<(), Failure> {
    let mut session = Session { global: &cli.global, console, client: None };
    match cli.noun {
        Noun::Cluster(verb) => cluster::run(&mut session, verb).await,
        Noun::Key(verb) => key::run(&mut session, verb).await,
        Noun::Node(verb) => node::run(&mut session, verb).await,
        Noun::Audit(verb) => audit::run(&mut session, verb).await,
        Noun::Worker(verb) => worker::run(&mut session, verb).await,
        Noun::Admin(verb) => admin::run(&mut session, verb).await,
        Noun::Slot(verb) => slot::run(&mut session, verb).await,
        Noun::Ca(verb) => ca::run(&mut session, verb).await,
        Noun::Status(args) => status::run(&mut session, &args).await,
        Noun::Context(verb) => context::run(&mut session, verb),
        Noun::Completions { shell } => generate::completions(&mut session, shell),
        Noun::Man { folder } => generate::man(&folder),
        Noun::Version => {
            session.console.print(concat!("kmsctl ", env!("CARGO_PKG_VERSION")))?;
            Ok(())
        }
    }
}

/// What a command has at hand.
struct Session<'a> {
    global: &'a Global,
    console: &'a mut Console,
    client: Option<Client>,
}

impl Session<'_> {
    /// The client, over a link that is opened at the first call.
    async fn client(&mut self) -> Result<&mut Client, Failure> {
        if self.client.is_none() {
            let context = self.context()?;
            let timeout = self.global.timeout.as_duration();
            let connecting = Progress::begin("connecting to the agent");
            let link = Link::open(&context, timeout, clock::now()).await?;
            drop(connecting);
            self.client = Some(Client::new(link, timeout));
        }
        Ok(self.client.as_mut().expect("it was just set"))
    }

    /// The context that the command talks by.
    fn context(&self) -> Result<Context, Failure> {
        Ok(self.contexts()?.resolve(self.global.context.as_deref())?)
    }

    fn contexts(&self) -> Result<Contexts, Failure> {
        Ok(Contexts::read(self.global.config.as_deref())?)
    }

    /// Shows an answer in the wanted form.
    fn show<T: Serialize>(
        &mut self,
        answer: &T,
        table: impl FnOnce(bool, SystemTime) -> String,
    ) -> Result<(), Failure> {
        output::show(self.console, self.global.output, answer, |wide| table(wide, clock::now()))
    }

    /// Whether a person reads the output.
    fn for_people(&self) -> bool {
        matches!(self.global.output, Format::Table | Format::Wide)
    }
}
