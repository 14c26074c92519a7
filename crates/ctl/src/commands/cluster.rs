//! `kmsctl cluster`.

use std::time::SystemTime;

use fleet_kms_admin_api::{Cluster, CreateCluster, Operation};

use crate::cli::ClusterVerb;
use crate::commands::Session;
use crate::commands::changes::{self, Request};
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, pairs, wide};
use crate::output::time::{both, relative, short};

pub(super) async fn run(session: &mut Session<'_>, verb: ClusterVerb) -> Result<(), Failure> {
    match verb {
        ClusterVerb::Create { name, period, change } => {
            let body = CreateCluster { name, period };
            let request =
                Request { operation: Operation::CreateCluster, path: &[], body: Some(&body), revision: None };
            let created = changes::apply(session, &request, &change).await?;
            changes::show(session, &created, |cluster, _, now| details(cluster, now))
        }
        ClusterVerb::List => {
            let clusters: Vec<Cluster> = session.client().await?.list(Operation::ListClusters, &[]).await?;
            session.show(&clusters, |all, now| list(&clusters, all, now))
        }
        ClusterVerb::Show { cluster } => {
            let cluster: Cluster = session.client().await?.read(Operation::ShowCluster, &[&cluster]).await?;
            session.show(&cluster, |_, now| details(&cluster, now))
        }
    }
}

fn list(clusters: &[Cluster], all: bool, now: SystemTime) -> String {
    let columns = [
        column("NAME"),
        wide("ID"),
        column("NODES"),
        column("KEY"),
        column("KEY AGE"),
        column("NEXT ROTATION"),
        wide("PERIOD"),
        wide("CREATED"),
    ];
    let mut table = Table::new(all, &columns);
    for cluster in clusters {
        table.row([
            cluster.name.clone(),
            cluster.id.clone(),
            cluster.nodes.to_string(),
            format!("v{}", cluster.active_version),
            age(cluster),
            next_rotation(cluster, now),
            cluster.period.to_string(),
            cluster.created.to_string(),
        ]);
    }
    table.finish("no clusters; `kmsctl cluster create NAME` makes one")
}

/// A cluster, line by line.
pub(super) fn details(cluster: &Cluster, now: SystemTime) -> String {
    pairs(&[
        ("name", cluster.name.clone()),
        ("id", cluster.id.clone()),
        ("created", both(cluster.created, now)),
        ("nodes", cluster.nodes.to_string()),
        ("active version", cluster.active_version.to_string()),
        ("key id", cluster.key_id.clone()),
        ("age", age(cluster)),
        ("next rotation", next_rotation(cluster, now)),
        ("period", cluster.period.to_string()),
        ("versions", cluster.versions.to_string()),
        ("unbacked", unbacked(cluster)),
        ("revision", cluster.revision.to_string()),
    ])
}

/// Age of the active version, by the agent's clock.
pub(super) fn age(cluster: &Cluster) -> String {
    short(std::time::Duration::from_secs(cluster.age_seconds))
}

/// When the next rotation is due, or how long it is late.
pub(super) fn next_rotation(cluster: &Cluster, now: SystemTime) -> String {
    if cluster.overdue {
        return format!("OVERDUE {}", short(cluster.next_rotation.age(now)));
    }
    relative(cluster.next_rotation, now)
}

/// Versions that no verified backup holds yet.
pub(super) fn unbacked(cluster: &Cluster) -> String {
    if cluster.unbacked.is_empty() {
        return "-".to_owned();
    }
    cluster.unbacked.iter().map(|version| format!("v{version}")).collect::<Vec<_>>().join(",")
}
