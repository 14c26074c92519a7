//! `kmsctl worker`: identities for census and rewrap of one cluster.

use std::time::SystemTime;

use fleet_kms_admin_api::{CreateToken, Operation, Timestamp, Worker};
use fleet_kms_identity::Certificate;

use crate::cli::{WorkerArgs, WorkerVerb};
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::commands::node;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};
use crate::output::time::{relative, short};
use crate::worker_identity::{self, Renewed};

pub(super) async fn run(session: &mut Session<'_>, verb: WorkerVerb) -> Result<(), Failure> {
    match verb {
        WorkerVerb::Token(args) => {
            let body = CreateToken {
                worker: Some(args.name),
                cidr: args.cidr,
                ttl: args.ttl,
                ..CreateToken::default()
            };
            let hint = "on the worker's host: kmsctl worker enrol --agent HOST:7444 --directory DIRECTORY, with the \
                        token on standard input; then `kmsctl worker renew` once a day";
            node::issue(session, &args.cluster, &body, &args.change, hint).await
        }
        WorkerVerb::List { cluster } => {
            let client = session.client().await?;
            let workers: Vec<Worker> = client.list(Operation::ListWorkers, &[&cluster]).await?;
            session.show(&workers, |all, now| table(&workers, all, now))
        }
        WorkerVerb::Ban(args) => change(session, &args, Operation::BanWorker, Some("banning")).await,
        WorkerVerb::Unban(args) => change(session, &args, Operation::UnbanWorker, None).await,
        WorkerVerb::Enrol { agent, directory, token_file } => {
            let token = worker_identity::read_token(token_file.as_deref())?;
            let timeout = session.global.timeout.as_duration();
            let worker = worker_identity::enrol(&directory, &agent, &token, timeout).await?;
            Ok(session.console.print(&enrolled(&worker))?)
        }
        WorkerVerb::Renew { directory, agent } => {
            let timeout = session.global.timeout.as_duration();
            match worker_identity::renew(&directory, agent.as_deref(), timeout).await? {
                Renewed::Done(worker) => Ok(session.console.print(&enrolled(&worker))?),
                Renewed::NotDue(wait) => Ok(session
                    .console
                    .print(&format!("not due: it is renewed in {} at the earliest", short(wait)))?),
            }
        }
        WorkerVerb::Remove(args) => change(session, &args, Operation::RemoveWorker, Some("removing")).await,
    }
}

fn enrolled(worker: &Certificate) -> String {
    format!("{}, until {}", worker.id(), Timestamp::from(worker.not_after()))
}

fn table(workers: &[Worker], all: bool, now: SystemTime) -> String {
    let columns = [
        column("CLUSTER"),
        column("WORKER"),
        column("STATE"),
        column("CERTIFICATE ENDS"),
        wide("SERIAL"),
        wide("REVISION"),
        wide("ID"),
    ];
    let mut table = Table::new(all, &columns);
    for worker in workers {
        table.row([
            worker.cluster.clone(),
            worker.name.clone(),
            worker.state.to_string(),
            or_dash(worker.certificate_not_after.map(|time| relative(time, now))),
            or_dash(worker.serial.as_ref()),
            worker.revision.to_string(),
            worker.id.clone(),
        ]);
    }
    table.finish("no workers; `kmsctl worker token` lets one enrol")
}

async fn change(
    session: &mut Session<'_>,
    args: &WorkerArgs,
    operation: Operation,
    danger: Option<&str>,
) -> Result<(), Failure> {
    let path = [args.cluster.as_str(), args.worker.as_str()];
    let request = Request::bare(operation, &path);
    let changed = match danger {
        Some(doing) => {
            let what = format!("{doing} worker {} of {}", args.worker, args.cluster);
            let danger = Danger { what, name: &args.worker };
            changes::apply_dangerous(session, &request, &args.change, &danger).await?
        }
        None => changes::apply(session, &request, &args.change.change).await?,
    };
    changes::show(session, &changed, |worker: &Worker, all, now| {
        table(std::slice::from_ref(worker), all, now)
    })
}
