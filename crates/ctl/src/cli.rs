//! The command line: nouns, verbs and their arguments, as clap reads them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use fleet_kms_admin_api::HumanDuration;

/// Runs a fleet of Kubernetes clusters' KMS from one terminal.
///
/// Exit codes: 0 done, 1 failed otherwise, 2 wrong usage or input, 3 denied,
/// 4 conflict, 5 unavailable, 6 not found.
#[derive(Debug, Parser)]
#[command(name = "kmsctl", version, max_term_width = 100, subcommand_required = true)]
pub struct Cli {
    /// Arguments of every command.
    #[command(flatten)]
    pub global: Global,
    /// What the command is about.
    #[command(subcommand)]
    pub noun: Noun,
}

/// Arguments of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// How to print the answer.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// File with the contexts [default: ~/.config/fleet-kms/kmsctl.toml].
    #[arg(long, global = true, env = "KMSCTL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Context to use instead of the current one.
    #[arg(long, global = true, env = "KMSCTL_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
    /// Longest time for one request.
    #[arg(long, global = true, default_value = "30s", value_name = "DURATION")]
    pub timeout: HumanDuration,
}

/// Form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table, for people.
    Table,
    /// A table with all columns.
    Wide,
    /// JSON, as the admin API answers it.
    Json,
    /// The same as YAML.
    Yaml,
}

/// What the command is about.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Clusters: the tenants, each with its own key.
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Keys: versions, rotation, destruction.
    #[command(subcommand)]
    Key(KeyVerb),
    /// Nodes that wrap and unwrap for a cluster, and the tokens they enrol with.
    #[command(subcommand)]
    Node(NodeVerb),
    /// Who did what: search the audit, follow it, verify its files.
    #[command(subcommand)]
    Audit(AuditVerb),
    /// The fleet CA: who vouches for nodes, agents and admins.
    #[command(subcommand)]
    Ca(CaVerb),
    /// The fleet at a glance.
    Status(StatusArgs),
    /// Which agent to talk to, and as whom.
    #[command(subcommand)]
    Context(ContextVerb),
    /// Print the completion script of a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder.
    Man {
        /// The folder; it must exist.
        folder: PathBuf,
    },
    /// Print the version.
    Version,
}

/// Verbs of `cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterVerb {
    /// Create a cluster with its first key.
    Create {
        /// Name: lower-case letters, digits and `-`.
        name: String,
        /// Time between rotations, at least 1h [default: the agent's, 30d].
        #[arg(long, value_name = "DURATION")]
        period: Option<HumanDuration>,
        /// How to change it.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// List the clusters.
    #[command(visible_alias = "ls")]
    List,
    /// Show a cluster.
    Show {
        /// Name or cluster id.
        cluster: String,
    },
}

/// Verbs of `key`.
#[derive(Debug, Subcommand)]
pub enum KeyVerb {
    /// List every cluster's key: age, next rotation, what no backup holds yet.
    #[command(visible_alias = "ls")]
    List,
    /// Show a cluster's key and its versions.
    Show {
        /// Name or cluster id.
        cluster: String,
    },
    /// List the versions of a cluster's key.
    Versions {
        /// Name or cluster id.
        cluster: String,
    },
    /// Rotate a cluster's key now.
    Rotate {
        /// Name or cluster id.
        cluster: String,
        /// Activate a brand-new version instead of the prepared one.
        #[arg(long)]
        fresh: bool,
        /// What it must be at.
        #[command(flatten)]
        revision: RevisionArgs,
        /// How to change it.
        #[command(flatten)]
        change: DangerArgs,
    },
    /// Change the time between rotations.
    SetPeriod {
        /// Name or cluster id.
        cluster: String,
        /// The time, at least 1h.
        period: HumanDuration,
        /// What it must be at.
        #[command(flatten)]
        revision: RevisionArgs,
        /// How to change it.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Disable a version: what it wrapped cannot be read until it is enabled.
    Disable(VersionArgs),
    /// Enable a disabled version.
    Enable(VersionArgs),
    /// Schedule the destruction of a disabled version.
    Destroy(VersionArgs),
    /// Cancel a scheduled destruction.
    CancelDestroy(VersionArgs),
    /// Say, guard by guard, why a version may or may not be destroyed.
    Explain {
        /// Name or cluster id.
        cluster: String,
        /// The version.
        version: u32,
    },
}

/// A verb on one version.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Name or cluster id.
    pub cluster: String,
    /// The version.
    pub version: u32,
    /// What the cluster must be at.
    #[command(flatten)]
    pub revision: RevisionArgs,
    /// How to change it.
    #[command(flatten)]
    pub change: DangerArgs,
}

/// Verbs of `node`.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Issue a join token; only the token goes to standard output.
    Token(TokenArgs),
    /// List the join tokens of a cluster that can still be used.
    Tokens {
        /// Name or cluster id.
        #[arg(long)]
        cluster: String,
    },
    /// Revoke a join token.
    RevokeToken {
        /// Name or cluster id.
        #[arg(long)]
        cluster: String,
        /// Id of the token, as `node tokens` shows it.
        token: String,
        /// How to change it.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// List the nodes of all clusters or of one.
    #[command(visible_alias = "ls")]
    List {
        /// Name or cluster id.
        #[arg(long)]
        cluster: Option<String>,
    },
    /// Ban a node: its calls are refused and its connections closed.
    Ban(NodeArgs),
    /// Lift a ban.
    Unban(NodeArgs),
    /// Remove a node; to come back it needs a new join token.
    Remove(NodeArgs),
}

/// Arguments of `node token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Name or cluster id.
    #[arg(long)]
    pub cluster: String,
    /// Exact name of the node that may enrol.
    #[arg(long, conflicts_with = "pattern")]
    pub node: Option<String>,
    /// Pattern of new node names, with `*` for any text.
    #[arg(long)]
    pub pattern: Option<String>,
    /// Network from which it may be used.
    #[arg(long)]
    pub cidr: Option<String>,
    /// How many nodes may use it [default: 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub uses: Option<u32>,
    /// How long it is valid, up to a year [default: 15m].
    #[arg(long, value_name = "DURATION")]
    pub ttl: Option<HumanDuration>,
    /// How to change it.
    #[command(flatten)]
    pub change: ChangeArgs,
}

/// A verb on one node.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Name or cluster id.
    #[arg(long)]
    pub cluster: String,
    /// Name of the node.
    pub node: String,
    /// How to change it.
    #[command(flatten)]
    pub change: DangerArgs,
}

/// Verbs of `audit`.
#[derive(Debug, Subcommand)]
pub enum AuditVerb {
    /// Verify the files in a directory and name the first place where they do not hold.
    ///
    /// Without heads it promises only to find accidents: whoever can write the files can write them anew. Exit code 1
    /// when they do not hold.
    Verify(VerifyArgs),
    /// Search the answering agent's audit, the newest records first.
    Search(SearchArgs),
    /// Show the last records, and with -f those that come.
    Tail(TailArgs),
    /// List the ends of all agents' chains; keep the output as JSON for `audit verify --heads-file`.
    Heads,
}

/// Arguments of `audit verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Directory with the audit's files.
    pub directory: PathBuf,
    /// Compare with the heads that the store has, asked from the agent of the context.
    #[arg(long, conflicts_with = "heads_file")]
    pub heads: bool,
    /// Compare with heads that were kept: the output of `kmsctl audit heads -o json`.
    #[arg(long, value_name = "FILE")]
    pub heads_file: Option<PathBuf>,
    /// Agent whose files these are [default: the only one among the heads].
    #[arg(long, value_name = "NAME")]
    pub agent: Option<String>,
    /// PEM file with the fleet's roots, to judge checkpoints by [default: the context's].
    #[arg(long, value_name = "FILE")]
    pub roots: Option<PathBuf>,
}

/// Chain of the audit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ChainName {
    /// What was changed.
    #[default]
    Changes,
    /// Data calls and refused callers.
    Data,
}

/// What `audit search` looks for.
#[derive(Clone, Debug, Args)]
pub struct SearchArgs {
    /// Chain to search.
    #[arg(long, value_enum, default_value_t)]
    pub chain: ChainName,
    /// Not before this time: RFC 3339, or how long ago, such as 2h.
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Before this time.
    #[arg(long, value_name = "TIME")]
    pub to: Option<String>,
    /// A part of the identity that asked.
    #[arg(long)]
    pub who: Option<String>,
    /// Name or cluster id.
    #[arg(long)]
    pub cluster: Option<String>,
    /// What was done or called, such as node_ban.
    #[arg(long)]
    pub action: Option<String>,
    /// How it ended, such as done.
    #[arg(long)]
    pub outcome: Option<String>,
    /// The most records.
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
}

/// Arguments of `audit tail`.
#[derive(Debug, Args)]
pub struct TailArgs {
    /// Chain to show.
    #[arg(long, value_enum, default_value_t)]
    pub chain: ChainName,
    /// How many records to begin with.
    #[arg(short = 'n', long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub lines: u32,
    /// Go on, until interrupted.
    #[arg(short, long)]
    pub follow: bool,
}

/// Verbs of `ca`.
#[derive(Debug, Subcommand)]
pub enum CaVerb {
    /// Show the CA's generations: state, end, fingerprint, until when trusted.
    Show,
    /// Replace the issuing CA now, in good order: nobody has to do anything.
    Rotate {
        /// Replace the root too.
        #[arg(long)]
        root: bool,
        /// The CA's key may be known to others: replace root and issuing CA, trust
        /// nothing of the old ones, and list the nodes that need a join token.
        #[arg(long, conflicts_with = "root")]
        compromised: bool,
        /// How to change it.
        #[command(flatten)]
        change: DangerArgs,
    },
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show it again and again, until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// Time between two looks.
    #[arg(long, default_value = "2s", requires = "watch", value_name = "DURATION")]
    pub every: HumanDuration,
}

/// Verbs of `context`.
#[derive(Debug, Subcommand)]
pub enum ContextVerb {
    /// List the contexts.
    #[command(visible_alias = "ls")]
    List,
    /// Make a context the current one.
    Use {
        /// Its name.
        name: String,
    },
    /// Show a context: server, identity, how long its certificate is valid.
    Show {
        /// Its name [default: the current one].
        name: Option<String>,
    },
}

/// Arguments of every change.
#[derive(Clone, Debug, Default, Args)]
pub struct ChangeArgs {
    /// Why; stands in the audit record.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what would happen, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Key that makes a repeated call harmless [default: a random one].
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
}

/// Argument of a change of a cluster's keyring, which has a revision to compare.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct RevisionArgs {
    /// Refuse the change unless the cluster is at this revision.
    #[arg(long, value_name = "NUMBER")]
    pub if_revision: Option<u64>,
}

/// Arguments of a change that can hurt.
#[derive(Clone, Debug, Default, Args)]
pub struct DangerArgs {
    /// Arguments of every change.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// Do not ask.
    #[arg(short, long)]
    pub yes: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_is_for_a_name_or_a_pattern_but_not_both() {
        let both = ["kmsctl", "node", "token", "--cluster", "a", "--node", "n", "--pattern", "n-*"];
        assert!(Cli::try_parse_from(both).is_err());
        assert!(Cli::try_parse_from(&both[..7]).is_ok());
    }

    #[test]
    fn version_0_is_read_and_left_to_the_agent_but_a_word_is_not() {
        assert!(Cli::try_parse_from(["kmsctl", "key", "disable", "a", "two"]).is_err());
    }
}
