//! `kmsctl key`.

use std::time::SystemTime;

use fleet_kms_admin_api::{Cluster, Explanation, Operation, RotateKey, SetRotation, Version, VersionState};

use crate::cli::{KeyVerb, VersionArgs};
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::commands::cluster::{age, details, next_rotation, unbacked};
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};
use crate::output::time::relative;

pub(super) async fn run(session: &mut Session<'_>, verb: KeyVerb) -> Result<(), Failure> {
    match verb {
        KeyVerb::List => list(session).await,
        KeyVerb::Show { cluster } => show(session, &cluster).await,
        KeyVerb::Versions { cluster } => {
            let versions: Vec<Version> =
                session.client().await?.list(Operation::ListVersions, &[&cluster]).await?;
            session.show(&versions, |all, now| version_table(&versions, all, now))
        }
        KeyVerb::Rotate { cluster, fresh, revision, change } => {
            let body = RotateKey { fresh };
            let path = [cluster.as_str()];
            let request = Request {
                operation: Operation::RotateKey,
                path: &path,
                body: Some(&body),
                revision: revision.if_revision,
            };
            let rotated = if fresh {
                let danger = Danger { what: format!("a fresh rotation of {cluster}"), name: &cluster };
                changes::apply_dangerous(session, &request, &change, &danger).await?
            } else {
                changes::apply(session, &request, &change.change).await?
            };
            changes::show(session, &rotated, |cluster, _, now| details(cluster, now))
        }
        KeyVerb::SetPeriod { cluster, period, revision, change } => {
            let body = SetRotation { period };
            let path = [cluster.as_str()];
            let request = Request {
                operation: Operation::SetRotation,
                path: &path,
                body: Some(&body),
                revision: revision.if_revision,
            };
            let set = changes::apply(session, &request, &change).await?;
            changes::show(session, &set, |cluster, _, now| details(cluster, now))
        }
        KeyVerb::Disable(args) => change(session, &args, Operation::DisableVersion, Some("disabling")).await,
        KeyVerb::Enable(args) => change(session, &args, Operation::EnableVersion, None).await,
        KeyVerb::Destroy(args) => {
            change(session, &args, Operation::DestroyVersion, Some("scheduling the destruction of")).await
        }
        KeyVerb::CancelDestroy(args) => change(session, &args, Operation::CancelDestroyVersion, None).await,
        KeyVerb::Explain { cluster, version } => explain(session, &cluster, version).await,
    }
}

async fn list(session: &mut Session<'_>) -> Result<(), Failure> {
    let clusters: Vec<Cluster> = session.client().await?.list(Operation::ListClusters, &[]).await?;
    session.show(&clusters, |all, now| {
        let columns = [
            column("CLUSTER"),
            column("ACTIVE"),
            wide("KEY ID"),
            column("AGE"),
            column("NEXT ROTATION"),
            column("PERIOD"),
            column("VERSIONS"),
            column("UNBACKED"),
        ];
        let mut table = Table::new(all, &columns);
        for cluster in &clusters {
            table.row([
                cluster.name.clone(),
                format!("v{}", cluster.active_version),
                cluster.key_id.clone(),
                age(cluster),
                next_rotation(cluster, now),
                cluster.period.to_string(),
                cluster.versions.to_string(),
                unbacked(cluster),
            ]);
        }
        table.finish("no clusters")
    })
}

/// A cluster's key: what programs get is `{cluster, versions}`.
async fn show(session: &mut Session<'_>, name: &str) -> Result<(), Failure> {
    #[derive(serde::Serialize)]
    struct Key {
        cluster: Cluster,
        versions: Vec<Version>,
    }
    let client = session.client().await?;
    let cluster = client.read(Operation::ShowCluster, &[name]).await?;
    let versions = client.list(Operation::ListVersions, &[name]).await?;
    let key = Key { cluster, versions };
    session.show(&key, |all, now| {
        format!("{}\n\n{}", details(&key.cluster, now), version_table(&key.versions, all, now))
    })
}

fn version_table(versions: &[Version], all: bool, now: SystemTime) -> String {
    let columns = [
        column("VERSION"),
        column("STATE"),
        column("KEY ID"),
        wide("CREATED"),
        column("ACTIVATED"),
        wide("DEACTIVATED"),
        wide("DISABLED"),
        column("WRAPS"),
        column("UNBACKED"),
    ];
    let mut table = Table::new(all, &columns);
    let ago = |time: Option<_>| or_dash(time.map(|time| relative(time, now)));
    for version in versions {
        table.row([
            version.version.to_string(),
            state(version, now),
            version.key_id.clone(),
            version.created.to_string(),
            ago(version.activated),
            ago(version.deactivated),
            ago(version.disabled),
            version.wraps.to_string(),
            if version.unbacked { "yes".into() } else { "-".into() },
        ]);
    }
    table.finish("no versions")
}

fn state(version: &Version, now: SystemTime) -> String {
    match (&version.state, version.destroy_not_before) {
        (VersionState::DestroyScheduled, Some(time)) => {
            format!("{} ({})", version.state, relative(time, now))
        }
        (state, _) => state.to_string(),
    }
}

async fn change(
    session: &mut Session<'_>,
    args: &VersionArgs,
    operation: Operation,
    danger: Option<&str>,
) -> Result<(), Failure> {
    let version = args.version.to_string();
    let path = [args.cluster.as_str(), version.as_str()];
    let request = Request::bare(operation, &path).at(args.revision.if_revision);
    let changed = match danger {
        Some(doing) => {
            let what = format!("{doing} version {version} of {}", args.cluster);
            let danger = Danger { what, name: &args.cluster };
            changes::apply_dangerous(session, &request, &args.change, &danger).await?
        }
        None => changes::apply(session, &request, &args.change.change).await?,
    };
    changes::show(session, &changed, |version: &Version, all, now| {
        version_table(std::slice::from_ref(version), all, now)
    })
}

async fn explain(session: &mut Session<'_>, cluster: &str, version: u32) -> Result<(), Failure> {
    let path = [cluster, &version.to_string()];
    let explanation: Explanation = session.client().await?.read(Operation::ExplainVersion, &path).await?;
    session.show(&explanation, |all, _| {
        let mut table = Table::new(all, &[column("GUARD"), column("OK"), column("WHY")]);
        for guard in &explanation.guards {
            let ok = if guard.ok { "yes" } else { "no" };
            table.row([guard.name.clone(), ok.to_owned(), guard.why.clone()]);
        }
        let may = if explanation.destroyable { "may" } else { "may not" };
        format!(
            "version {} of {} ({}) {may} be destroyed\n\n{}",
            explanation.version,
            crate::console::clean(&explanation.cluster),
            explanation.state,
            table.finish("no guards")
        )
    })
}
