//! `kmsctl audit verify`: the files of one agent's audit against themselves, its kept heads and the fleet's roots.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use fleet_kms_admin_api::{AuditChain, AuditHead, Operation};
use fleet_kms_audit::{Against, ChainReport, Head, Report, SignedCheckpoint, verify_against};
use fleet_kms_identity::{split_pem_chain, verify_statement};
use serde::Serialize;

use crate::cli::VerifyArgs;
use crate::commands::Session;
use crate::console::Emphasis;
use crate::failure::Failure;

/// What was found, as JSON shows it.
#[derive(Serialize)]
struct Verdict {
    sound: bool,
    compared_with_heads: bool,
    chains: Vec<ChainVerdict>,
}

#[derive(Serialize)]
struct ChainVerdict {
    chain: &'static str,
    files: u64,
    records: u64,
    head_seq: u64,
    head_hash: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<CheckpointVerdict>,
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<String>,
}

#[derive(Serialize)]
struct CheckpointVerdict {
    agent: String,
    seq: u64,
    time: String,
    signature_judged: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    broken: Option<String>,
}

pub(super) async fn run(session: &mut Session<'_>, args: VerifyArgs) -> Result<(), Failure> {
    let heads = heads(session, &args).await?;
    let heads = heads.map(|heads| of_one_agent(heads, args.agent.as_deref())).transpose()?;
    let agent = heads.as_ref().map(|(agent, _)| agent.clone()).or(args.agent.clone());
    let roots = roots(session, &args)?;
    let signer = |signed: &SignedCheckpoint| judge(signed, agent.as_deref(), roots.as_deref().unwrap_or(&[]));
    let of = |chain: AuditChain| {
        let head = heads.as_ref()?.1.iter().find(|head| head.chain == chain)?;
        Some(Head { seq: head.seq, hash: HEXLOWER.decode(head.hash.as_bytes()).ok()?.try_into().ok()? })
    };
    let against = Against {
        changes: of(AuditChain::Changes),
        data: of(AuditChain::Data),
        signer: roots.is_some().then_some(&signer as _),
    };
    let report =
        verify_against(&args.directory, against).map_err(|source| unreadable(&args.directory, source))?;
    if report.changes.files + report.data.files == 0 && heads.is_none() {
        return Err(Failure::Unclear {
            what: format!("there are no audit files in {}", args.directory.display()),
            remedy: "name the agent's audit.directory, or a copy of it".to_owned(),
        });
    }
    show(session, &report, heads.is_some(), roots.is_some())
}

fn show(session: &mut Session<'_>, report: &Report, with_heads: bool, judged: bool) -> Result<(), Failure> {
    let chains = [&report.changes, &report.data].map(|chain| verdict(chain, judged));
    let verdict =
        Verdict { sound: report.is_sound(), compared_with_heads: with_heads, chains: chains.into() };
    let text = text(session, &verdict);
    session.show(&verdict, |_, _| text)?;
    if session.for_people() {
        if !with_heads {
            session.console.warn(
                "compared with no heads: this promises only to find accidents; give --heads or --heads-file",
            );
        }
        if !judged && verdict.chains.iter().any(|chain| chain.checkpoint.is_some()) {
            session
                .console
                .warn("nobody judged the checkpoint's signature: name the fleet's roots by --roots");
        }
    }
    match [&report.changes, &report.data].into_iter().find_map(|chain| chain.broken.as_ref()) {
        Some(place) => Err(Failure::AuditBroken { place: place.to_string() }),
        None => Ok(()),
    }
}

fn verdict(chain: &ChainReport, judged: bool) -> ChainVerdict {
    ChainVerdict {
        chain: chain.chain.name(),
        files: chain.files,
        records: chain.lines,
        head_seq: chain.head.seq,
        head_hash: HEXLOWER.encode(&chain.head.hash),
        checkpoint: chain.checkpoint.as_ref().map(|checkpoint| CheckpointVerdict {
            agent: checkpoint.agent.clone(),
            seq: checkpoint.seq,
            time: checkpoint.time.clone(),
            signature_judged: judged,
            broken: checkpoint.broken.clone(),
        }),
        broken: chain.broken.as_ref().map(ToString::to_string),
    }
}

fn text(session: &Session<'_>, verdict: &Verdict) -> String {
    let lines = verdict.chains.iter().map(|chain| {
        let state = match &chain.broken {
            None => session.console.emphasise("holds", Emphasis::Green),
            Some(place) => {
                let broken = format!("DOES NOT HOLD: {}", crate::console::clean(place));
                session.console.emphasise(&broken, Emphasis::Red)
            }
        };
        let from = chain.checkpoint.as_ref().map_or_else(String::new, |checkpoint| {
            let broken = checkpoint.broken.as_ref().map(|place| format!("; in what was removed: {place}"));
            let broken = broken.unwrap_or_default();
            crate::console::clean(&format!(
                ", from checkpoint {} of {} on{broken}",
                checkpoint.seq, checkpoint.time
            ))
        });
        let ChainVerdict { chain, files, records, head_seq, .. } = chain;
        format!("{chain}: {records} records in {files} files, up to {head_seq}{from}: {state}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

async fn heads(session: &mut Session<'_>, args: &VerifyArgs) -> Result<Option<Vec<AuditHead>>, Failure> {
    if args.heads {
        return Ok(Some(session.client().await?.list(Operation::ListAuditHeads, &[]).await?));
    }
    let Some(path) = &args.heads_file else { return Ok(None) };
    let bytes = fs::read(path).map_err(|source| unreadable(path, source))?;
    let heads = serde_json::from_slice(&bytes).map_err(|source| unreadable(path, source))?;
    Ok(Some(heads))
}

/// The heads of the named agent, or of the only one.
fn of_one_agent(heads: Vec<AuditHead>, agent: Option<&str>) -> Result<(String, Vec<AuditHead>), Failure> {
    let mut names: Vec<_> = heads.iter().map(|head| head.agent.clone()).collect();
    names.dedup();
    let name = match (agent, names.as_slice()) {
        (Some(agent), _) if names.iter().any(|name| name == agent) => agent.to_owned(),
        (None, [only]) => only.clone(),
        _ => {
            let what = match agent {
                Some(agent) => format!("there are no heads of agent {agent}"),
                None => format!("there are heads of {} agents", names.len()),
            };
            let remedy = format!("give --agent with one of: {}", names.join(", "));
            return Err(Failure::Unclear { what, remedy });
        }
    };
    let own = heads.into_iter().filter(|head| head.agent == name).collect();
    Ok((name, own))
}

/// The roots that were named, or those of the context, if there is one.
fn roots(session: &Session<'_>, args: &VerifyArgs) -> Result<Option<Vec<Vec<u8>>>, Failure> {
    let path: PathBuf = match &args.roots {
        Some(path) => path.clone(),
        None => {
            let context = session.contexts().ok();
            let context = context.and_then(|all| all.resolve(session.global.context.as_deref()).ok());
            let Some(context) = context else { return Ok(None) };
            context.roots
        }
    };
    let pem = fs::read(&path).map_err(|source| unreadable(&path, source))?;
    let roots = split_pem_chain(&pem).map_err(|source| unreadable(&path, source))?;
    Ok(Some(roots.iter().map(|root| root.to_vec()).collect()))
}

fn judge(signed: &SignedCheckpoint, agent: Option<&str>, roots: &[Vec<u8>]) -> Result<(), String> {
    if let Some(agent) = agent.filter(|agent| *agent != signed.checkpoint.agent) {
        return Err(format!("it is of agent {}, not of {agent}", signed.checkpoint.agent));
    }
    verify_statement(&signed.message(), &signed.signature, &signed.issuers, roots)
        .map_err(|error| error.to_string())
}

fn unreadable(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::Unreadable { path: path.to_owned(), source: source.into() }
}
