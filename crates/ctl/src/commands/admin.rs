//! `kmsctl admin`: roles and scopes. Admins are made on the agent's host.

use std::time::SystemTime;

use fleet_kms_admin_api::{Admin, Operation, Role, SetRoles, SetScope};

use crate::cli::AdminVerb;
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, pairs, wide};
use crate::output::time::{both, relative};

pub(super) async fn run(session: &mut Session<'_>, verb: AdminVerb) -> Result<(), Failure> {
    match verb {
        AdminVerb::List => {
            let admins: Vec<Admin> = session.client().await?.list(Operation::ListAdmins, &[]).await?;
            session.show(&admins, |all, now| table(&admins, all, now))
        }
        AdminVerb::Show { admin } => {
            let admin: Admin = session.client().await?.read(Operation::ShowAdmin, &[&admin]).await?;
            session.show(&admin, |_, now| details(&admin, now))
        }
        AdminVerb::SetRole { admin, roles, change } => {
            let body = SetRoles { roles: roles.iter().map(|role| Role::from(role.as_str())).collect() };
            let path = [admin.as_str()];
            let request = Request { operation: Operation::SetAdminRoles, path: &path, body: Some(&body) };
            let set = changes::apply(session, &request, &change).await?;
            changes::show(session, &set, |admin, _, now| details(admin, now))
        }
        AdminVerb::SetScope { admin, all, clusters, change } => {
            let body = SetScope { all, clusters };
            let path = [admin.as_str()];
            let request = Request { operation: Operation::SetAdminScope, path: &path, body: Some(&body) };
            let set = changes::apply(session, &request, &change).await?;
            changes::show(session, &set, |admin, _, now| details(admin, now))
        }
        AdminVerb::Remove { admin, change } => {
            let path = [admin.as_str()];
            let request = Request::bare(Operation::RemoveAdmin, &path);
            let danger = Danger { what: format!("removing admin {admin}"), name: &admin };
            let removed = changes::apply_dangerous(session, &request, &change, &danger).await?;
            changes::show(session, &removed, |admin, _, now| details(admin, now))
        }
    }
}

fn table(admins: &[Admin], all: bool, now: SystemTime) -> String {
    let columns = [
        column("ADMIN"),
        column("ROLES"),
        column("SCOPE"),
        column("STATE"),
        column("CERTIFICATE ENDS"),
        wide("SERIAL"),
        wide("REVISION"),
        wide("ID"),
    ];
    let mut table = Table::new(all, &columns);
    for admin in admins {
        table.row([
            admin.name.clone(),
            roles(admin),
            scope(admin),
            admin.state.to_string(),
            or_dash(admin.certificate_not_after.map(|time| relative(time, now))),
            or_dash(admin.serial.as_ref()),
            admin.revision.to_string(),
            admin.id.clone(),
        ]);
    }
    table.finish("no admins")
}

fn details(admin: &Admin, now: SystemTime) -> String {
    pairs(&[
        ("name", admin.name.clone()),
        ("id", admin.id.clone()),
        ("roles", roles(admin)),
        ("scope", scope(admin)),
        ("state", admin.state.to_string()),
        ("certificate ends", or_dash(admin.certificate_not_after.map(|time| both(time, now)))),
        ("serial", or_dash(admin.serial.as_ref())),
        ("revision", admin.revision.to_string()),
    ])
}

fn roles(admin: &Admin) -> String {
    admin.roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn scope(admin: &Admin) -> String {
    if admin.scope.all { "all".to_owned() } else { admin.scope.clusters.join(",") }
}
