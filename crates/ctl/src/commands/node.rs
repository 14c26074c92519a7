//! `kmsctl node`: nodes and the join tokens they enrol with.

use std::time::SystemTime;

use fleet_kms_admin_api::{Change, CreateToken, IssuedToken, Node, Operation, Token};

use crate::cli::{NodeArgs, NodeVerb, TokenArgs};
use crate::commands::Session;
use crate::commands::changes::{self, Danger, Request};
use crate::failure::Failure;
use crate::output::Table;
use crate::output::table::{column, or_dash, wide};
use crate::output::time::relative;

pub(super) async fn run(session: &mut Session<'_>, verb: NodeVerb) -> Result<(), Failure> {
    match verb {
        NodeVerb::Token(args) => token(session, args).await,
        NodeVerb::Tokens { cluster } => {
            let tokens: Vec<Token> = session.client().await?.list(Operation::ListTokens, &[&cluster]).await?;
            session.show(&tokens, |all, now| token_table(&tokens, all, now))
        }
        NodeVerb::RevokeToken { cluster, token, change } => {
            let path = [cluster.as_str(), token.as_str()];
            let request = Request::bare(Operation::RevokeToken, &path);
            let revoked = changes::apply(session, &request, &change).await?;
            changes::show(session, &revoked, |token: &Token, _, _| format!("token {} is revoked", token.id))
        }
        NodeVerb::List { cluster } => {
            let client = session.client().await?;
            let nodes: Vec<Node> = match cluster {
                Some(cluster) => client.list(Operation::ListClusterNodes, &[&cluster]).await?,
                None => client.list(Operation::ListNodes, &[]).await?,
            };
            session.show(&nodes, |all, now| node_table(&nodes, all, now))
        }
        NodeVerb::Ban(args) => change(session, &args, Operation::BanNode, Some("banning")).await,
        NodeVerb::Unban(args) => change(session, &args, Operation::UnbanNode, None).await,
        NodeVerb::Remove(args) => change(session, &args, Operation::RemoveNode, Some("removing")).await,
    }
}

/// Prints only the token on standard output, so that it can be piped to the node.
async fn token(session: &mut Session<'_>, args: TokenArgs) -> Result<(), Failure> {
    let body = CreateToken {
        node: args.node,
        pattern: args.pattern,
        cidr: args.cidr,
        uses: args.uses,
        ttl: args.ttl,
    };
    let path = [args.cluster.as_str()];
    let request =
        Request { operation: Operation::CreateToken, path: &path, body: Some(&body), revision: None };
    let issued: Change<IssuedToken> = changes::apply(session, &request, &args.change).await?;
    changes::show(session, &Change { effects: Vec::new(), ..issued.clone() }, |issued, _, _| {
        crate::console::clean(&issued.token)
    })?;
    if let (true, Some(IssuedToken { details, .. })) = (session.for_people(), &issued.result) {
        let whom = details.node.as_ref().or(details.pattern.as_ref()).map_or("a new node", |name| name);
        let hint = format!(
            "for {whom} of cluster {}, {} use(s), until {}\non the node: kms-sidecar enrol, with the token on \
             standard input or in the file `token` of its identity directory",
            details.cluster, details.uses, details.expires
        );
        session.console.tell(&crate::console::clean(&hint));
    }
    Ok(())
}

fn token_table(tokens: &[Token], all: bool, now: SystemTime) -> String {
    let columns = [
        column("ID"),
        column("NODE"),
        column("CIDR"),
        column("USED"),
        column("EXPIRES"),
        wide("CREATED"),
        wide("CREATED BY"),
    ];
    let mut table = Table::new(all, &columns);
    for token in tokens {
        table.row([
            token.id.clone(),
            token.node.clone().or(token.pattern.clone()).unwrap_or_else(|| "any new".into()),
            or_dash(token.cidr.as_ref()),
            format!("{} of {}", token.used, token.uses),
            relative(token.expires, now),
            token.created.to_string(),
            or_dash(token.created_by.as_ref()),
        ]);
    }
    table.finish("no tokens that can still be used")
}

fn node_table(nodes: &[Node], all: bool, now: SystemTime) -> String {
    let columns = [
        column("CLUSTER"),
        column("NODE"),
        column("STATE"),
        column("LAST SEEN"),
        column("CERTIFICATE ENDS"),
        column("HIGHEST VERSION"),
        column("BUILD"),
        wide("SERIAL"),
        wide("ID"),
    ];
    let mut table = Table::new(all, &columns);
    let relative = |time: Option<_>| or_dash(time.map(|time| relative(time, now)));
    for node in nodes {
        table.row([
            node.cluster.clone(),
            node.name.clone(),
            node.state.to_string(),
            relative(node.last_seen),
            relative(node.certificate_not_after),
            or_dash(node.highest_version.map(|version| format!("v{version}"))),
            or_dash(node.build.as_ref()),
            or_dash(node.serial.as_ref()),
            node.id.clone(),
        ]);
    }
    table.finish("no nodes; `kmsctl node token` lets one enrol")
}

async fn change(
    session: &mut Session<'_>,
    args: &NodeArgs,
    operation: Operation,
    danger: Option<&str>,
) -> Result<(), Failure> {
    let path = [args.cluster.as_str(), args.node.as_str()];
    let request = Request::bare(operation, &path);
    let changed = match danger {
        Some(doing) => {
            let what = format!("{doing} node {} of {}", args.node, args.cluster);
            let danger = Danger { what, name: &args.node };
            changes::apply_dangerous(session, &request, &args.change, &danger).await?
        }
        None => changes::apply(session, &request, &args.change.change).await?,
    };
    changes::show(session, &changed, |node: &Node, all, now| node_table(std::slice::from_ref(node), all, now))
}
