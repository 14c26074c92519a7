//! Many admins list a large fleet while data calls run: what the data calls notice of it, in one run of interleaved rounds.
//!
//! `make test` takes a small fleet and few admins; `make admin-load` 200 admins and 10,000 clusters.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests: what is not there fails them"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fleet_kms_admin_api::{Operation, PageQuery};
use fleet_kms_ctl::client::Client;
use fleet_kms_ctl::client::link::Link;
use fleet_kms_ctl::contexts::Contexts;
use fleet_kms_process::{clock, runtime};
use fleet_kms_tests::big_store::{DAY, Fill, fill, load_config};
use fleet_kms_tests::child::run;
use fleet_kms_tests::fleet::{Fleet, Sidecar};
use fleet_kms_tests::peers::{ClientVersion, kms_client};
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

/// Items on a page, as kmsctl asks for.
const PAGE: u32 = 500;
/// Pages that all admins together ask for in a second.
const PAGES_PER_SECOND: u32 = 40;
/// Calls of the API server at once.
const CALLERS: &str = "4";
/// How much worse than alone the median round's 99 % may be where the machine is this test's own.
const LIMIT: f64 = 1.2;
/// The same where others use the machine too: only what no noise explains.
const LIMIT_SHARED: f64 = 4.0;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn data_calls_hardly_notice_that_many_admins_list_the_fleet() {
    let (admins, clusters) = (number("ADMINS", 20), number("CLUSTERS", 1_000));
    let (rounds, calls) = (number("ROUNDS", 5), number("CALLS", 1_500).to_string());
    let mut fleet = Fleet::start().unwrap();
    fleet.agent.stop().unwrap();
    let config = load_config(&fleet.agent.config).unwrap();
    let all = Fill { clusters, versions: 3, activated: clock::now() - DAY };
    runtime::multi_thread().unwrap().block_on(fill(&config, all)).unwrap();
    fleet.agent.start().unwrap();
    let cluster = fleet.cluster("loaded").unwrap();
    let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    let contexts: Vec<PathBuf> = (0..admins).map(|number| issue(&fleet, number)).collect();
    let client = kms_client(ClientVersion::V0_37_2).unwrap();

    let load = Load::start(contexts);
    let (mut ratios, mut pages) = (Vec::new(), 0);
    for round in 0..rounds {
        let alone = p99(&client, &sidecar, &calls);
        load.run(true);
        let before = load.pages();
        let beside = p99(&client, &sidecar, &calls);
        let listed = load.pages() - before;
        load.run(false);
        pages += listed;
        println!(
            "round {round}: 99 % of data calls within {alone:.0} µs alone, {beside:.0} µs beside {listed} pages"
        );
        ratios.push(beside / alone);
    }
    load.stop();
    ratios.sort_by(f64::total_cmp);
    let median = *ratios.get(ratios.len() / 2).unwrap();
    println!(
        "{admins} admins, {clusters} clusters, {pages} pages of {PAGE}: p99 is {median:.2} times that without them"
    );
    assert!(pages > 0, "the admins listed nothing");
    let own = std::env::var_os("ADMINS").is_some();
    assert!(median <= if own { LIMIT } else { LIMIT_SHARED }, "{ratios:?}");
}

fn issue(fleet: &Fleet, number: usize) -> PathBuf {
    let name = format!("admin-{number}");
    let directory = fleet.path().join(&name);
    let path = directory.display().to_string();
    fleet.host(&["admin", "issue", &name, "--role", "auditor", "--directory", &path]).unwrap();
    directory.join("kmsctl.toml")
}

/// One round of data calls; every one must succeed.
fn p99(client: &Path, sidecar: &Sidecar, calls: &str) -> f64 {
    let mut command = Command::new(client);
    command.args(["bench", "-socket"]).arg(&sidecar.socket);
    command.args(["-calls", calls, "-warmup", "200", "-callers", CALLERS]);
    let line: Value = serde_json::from_str(run(&mut command).unwrap().trim()).unwrap();
    line.get("p99_us").unwrap().as_f64().unwrap()
}

/// The admins, in a thread of their own.
struct Load {
    shared: Arc<Shared>,
    thread: std::thread::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    runs: AtomicBool,
    stops: AtomicBool,
    pages: AtomicU64,
}

impl Load {
    fn start(contexts: Vec<PathBuf>) -> Self {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = runtime::current_thread(1).unwrap();
            runtime.block_on(async {
                let every =
                    Duration::from_secs(1) / PAGES_PER_SECOND * u32::try_from(contexts.len()).unwrap();
                let offset = every / u32::try_from(contexts.len()).unwrap();
                let begin = Instant::now();
                let admins = (0..).zip(contexts).map(|(number, context)| {
                    tokio::spawn(admin(context, Arc::clone(&of_thread), begin + offset * number, every))
                });
                for admin in admins.collect::<Vec<_>>() {
                    admin.await.unwrap();
                }
            });
        });
        Self { shared, thread }
    }

    fn run(&self, runs: bool) {
        self.shared.runs.store(runs, Ordering::Relaxed);
    }

    fn pages(&self) -> u64 {
        self.shared.pages.load(Ordering::Relaxed)
    }

    fn stop(self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Lists the fleet from its first page to its last, again and again, at its own pace.
async fn admin(context: PathBuf, shared: Arc<Shared>, mut next: Instant, every: Duration) {
    let context = Contexts::read(Some(&context)).unwrap().resolve(None).unwrap();
    let timeout = Duration::from_secs(30);
    let mut client = Client::new(Link::open(&context, timeout, clock::now()).await.unwrap(), timeout);
    let mut query = PageQuery { limit: Some(PAGE), after: None };
    while !shared.stops.load(Ordering::Relaxed) {
        sleep_until(next.min(Instant::now() + Duration::from_millis(200))).await;
        if Instant::now() < next {
            continue;
        }
        // What was missed while the others measured alone is not made up for.
        next = (next + every).max(Instant::now());
        if shared.runs.load(Ordering::Relaxed) {
            let page = client.page::<IgnoredAny>(Operation::ListClusters, &[], &query, &[]).await.unwrap();
            assert!(!page.items.is_empty());
            query.after = page.next;
            shared.pages.fetch_add(1, Ordering::Relaxed);
        }
    }
}
