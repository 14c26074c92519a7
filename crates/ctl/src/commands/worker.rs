//! `kmsctl worker`: identities for census and rewrap of one cluster.

use std::time::SystemTime;

use fleet_kms_admin_api::{CreateToken, Operation, Worker};

use crate::cli::{WorkerArgs, WorkerVerb};
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::commands::node;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};
use crate::output::time::relative;

pub(super) async fn run(session: &mut Session<'_>, verb: WorkerVerb) -> Result<(), Failure> {
    match verb {
        WorkerVerb::Token(args) => {
            let body = CreateToken {
                worker: Some(args.name),
                cidr: args.cidr,
                ttl: args.ttl,
                ..CreateToken::default()
            };
            let hint = "its certificate is renewed while it is valid; after that it needs a new token";
            node::issue(session, &args.cluster, &body, &args.change, hint).await
        }
        WorkerVerb::List { cluster } => {
            let client = session.client().await?;
            let workers: Vec<Worker> = client.list(Operation::ListWorkers, &[&cluster]).await?;
            session.show(&workers, |all, now| table(&workers, all, now))
        }
        WorkerVerb::Ban(args) => change(session, &args, Operation::BanWorker, Some("banning")).await,
        WorkerVerb::Unban(args) => change(session, &args, Operation::UnbanWorker, None).await,
        WorkerVerb::Remove(args) => change(session, &args, Operation::RemoveWorker, Some("removing")).await,
    }
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
