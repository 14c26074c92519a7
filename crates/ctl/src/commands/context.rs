//! `kmsctl context`: never talks to an agent.

use serde::Serialize;

use fleet_kms_admin_api::Timestamp;
use fleet_kms_identity::{Certificate, split_pem_chain};

use crate::cli::ContextVerb;
use crate::commands::Session;
use crate::contexts::Context;
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, pairs, wide};
use crate::output::time::both;

/// A context as it is shown.
#[derive(Serialize)]
struct Shown {
    current: bool,
    #[serde(flatten)]
    context: Context,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<Identity>,
}

/// Who the certificate says we are.
#[derive(Serialize)]
struct Identity {
    id: String,
    not_after: Timestamp,
}

pub(super) fn run(session: &mut Session<'_>, verb: ContextVerb) -> Result<(), Failure> {
    let mut contexts = session.contexts()?;
    let current = contexts.current().map(str::to_owned);
    match verb {
        ContextVerb::List => {
            let shown: Result<Vec<Shown>, Failure> = contexts
                .all()
                .iter()
                .map(|context| Ok(read(contexts.resolve(Some(&context.name))?, current.as_deref())))
                .collect();
            let shown = shown?;
            session.show(&shown, |all, _| list(&shown, all))
        }
        ContextVerb::Use { name } => {
            contexts.use_context(&name)?;
            session.console.print(&format!("{name} is the current context"))?;
            Ok(())
        }
        ContextVerb::Show { name } => {
            let name = name.or_else(|| session.global.context.clone());
            let shown = read(contexts.resolve(name.as_deref())?, current.as_deref());
            session.show(&shown, |_, now| {
                let (id, ends) = shown.identity.as_ref().map_or_else(
                    || ("not readable".to_owned(), "-".to_owned()),
                    |identity| (identity.id.clone(), both(identity.not_after, now)),
                );
                let context = &shown.context;
                pairs(&[
                    ("name", context.name.clone()),
                    ("server", context.server.clone()),
                    ("identity", id),
                    ("certificate ends", ends),
                    ("certificate", context.certificate.display().to_string()),
                    ("key", context.key.display().to_string()),
                    ("roots", context.roots.display().to_string()),
                ])
            })
        }
    }
}

fn read(context: Context, current: Option<&str>) -> Shown {
    let identity = std::fs::read(&context.certificate).ok().and_then(|pem| {
        let chain = split_pem_chain(&pem).ok()?;
        let leaf = Certificate::from_der(chain.first()?).ok()?;
        Some(Identity { id: leaf.id().to_string(), not_after: leaf.not_after().into() })
    });
    Shown { current: current == Some(&context.name), context, identity }
}

fn list(contexts: &[Shown], all: bool) -> String {
    let columns =
        [column(""), column("NAME"), column("SERVER"), column("IDENTITY"), wide("CERTIFICATE ENDS")];
    let mut table = Table::new(all, &columns);
    for shown in contexts {
        let identity = shown.identity.as_ref();
        table.row([
            if shown.current { "*".into() } else { String::new() },
            shown.context.name.clone(),
            shown.context.server.clone(),
            identity.map_or_else(|| "not readable".into(), |identity| identity.id.clone()),
            identity.map_or_else(|| "-".into(), |identity| identity.not_after.to_string()),
        ]);
    }
    table.finish("no contexts")
}
