//! Power cuts of days to half a year, one test for each row of the table in docs/operations/identity.md: the real
//! programs with their wall clocks under libfaketime, and for the longest outage that heals by itself a real
//! kube-apiserver.
//!
//! Nobody waits for days: while a program is off its clock is moved, and a program that stays on sees its clock jump.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails by panicking, as the test does")]

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use fleet_kms_process::clock;
use fleet_kms_tests::child::run;
use fleet_kms_tests::control_plane::ControlPlane;
use fleet_kms_tests::encryption_config::EncryptionConfig;
use fleet_kms_tests::faketime::FakeClock;
use fleet_kms_tests::fleet::{Cluster, Fleet, Sidecar};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::programs::Program;
use fleet_kms_tests::wait::{self, START_LIMIT, timed};

const DAY: i64 = 86_400;
/// Outages after which everything comes back by itself, in days,
const BY_ITSELF: [i64; 4] = [4, 30, 60, 179];
/// and one after which a node has to be enrolled: certificate (7 days) and `max_offline` (180 days) are over.
const TOO_LONG: i64 = 188;

/// What a node's clock says when it boots.
#[derive(Clone, Copy, Debug)]
enum Boot {
    Right,
    At1970,
    AYearAhead,
}

impl Boot {
    const ALL: [Self; 3] = [Self::Right, Self::At1970, Self::AYearAhead];

    /// How far the clock is ahead of today's, so many days from today.
    fn ahead(self, days: i64) -> i64 {
        match self {
            Self::Right => days * DAY,
            Self::At1970 => {
                let now = clock::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                DAY - i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
            }
            Self::AYearAhead => (days + 365) * DAY,
        }
    }
}

/// One agent whose clock is set, and one cluster.
struct World {
    fleet: Fleet,
    cluster: Cluster,
    clock: FakeClock,
}

impl World {
    fn start() -> anyhow::Result<Self> {
        let mut fleet = Fleet::start()?;
        let cluster = fleet.cluster("alpha")?;
        let clock = FakeClock::new(&fleet.agent.directory)?;
        fleet.agent.stop()?;
        let spec_clock = clock.clone();
        fleet.agent.respec(|spec| spec_clock.apply(spec).unwrap());
        fleet.agent.start()?;
        Ok(Self { fleet, cluster, clock })
    }

    /// An enrolled node that runs with the right clock, with a DEK that it had wrapped.
    fn node(&self, name: &str) -> anyhow::Result<Node> {
        let mut sidecar = self.fleet.unenrolled_sidecar(&self.cluster, name)?;
        sidecar.enrol(&self.fleet.token(&self.cluster, name)?)?;
        let clock = FakeClock::new(sidecar.config.parent().context("a directory")?)?;
        let spec_clock = clock.clone();
        sidecar.respec(|spec| spec_clock.apply(spec).unwrap());
        sidecar.start()?;
        sidecar.wait_ready()?;
        let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)?;
        let wrapped = client.call(&["encrypt"])?.last()?.to_string();
        Ok(Node { name: name.to_owned(), sidecar, clock, client, wrapped })
    }

    /// Moves the running agent's clock, and waits until it has a certificate of that time, as one that ran all along.
    fn advance_to(&self, days: i64) -> anyhow::Result<()> {
        self.clock.set(days * DAY)?;
        let now = clock::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let now = i64::try_from(now)? + days * DAY;
        wait::until("the agent's next certificate", START_LIMIT, || {
            let metrics = self.fleet.agent.ops("/metrics")?.body;
            let name = "fleet_kms_agent_certificate_expiry_timestamp_seconds ";
            let expiry = metrics.lines().find_map(|line| line.strip_prefix(name)).context("the metric")?;
            Ok((expiry.parse::<i64>()? > now + 4 * DAY).then_some(()))
        })
    }

    /// A token for a node that exists, as an operator makes it whose own certificate has long expired.
    fn token_late(&self, node: &str) -> anyhow::Result<String> {
        let directory = self.fleet.path().join("late");
        let text = directory.to_str().context("a path in UTF-8")?;
        self.fleet.host(&["admin", "issue", "late", "--role", "operator", "--directory", text])?;
        let mut kmsctl =
            self.fleet.kmsctl_command(&["node", "token", "--cluster", "alpha", "--node", node])?;
        kmsctl.env("KMSCTL_CONFIG", directory.join("kmsctl.toml"));
        Ok(run(kmsctl.stdin(Stdio::null()))?.trim().to_owned())
    }
}

struct Node {
    name: String,
    sidecar: Sidecar,
    clock: FakeClock,
    client: KmsClient,
    wrapped: String,
}

impl Node {
    fn decrypts(&self) -> anyhow::Result<()> {
        self.client.call(&["decrypt", "-answer", &self.wrapped])?.ok().map(drop)
    }

    /// Waits until it decrypts what it had wrapped before the outage, and encrypts.
    fn comes_back(&self) -> anyhow::Result<()> {
        wait::until(&format!("{} to come back", self.name), START_LIMIT, || Ok(self.decrypts().ok()))
            .with_context(|| self.sidecar.log().unwrap_or_default())?;
        self.client.call(&["encrypt"])?.ok().map(drop)
    }

    /// Waits until it was told that only a token helps, and sees that it serves nothing.
    fn is_told_to_enrol(&mut self) -> anyhow::Result<()> {
        self.sidecar
            .running()?
            .wait_for_line("expired too long ago to be renewed; enrol this node", START_LIMIT)?;
        let refused = self.client.call(&["decrypt", "-answer", &self.wrapped])?.refused()?;
        ensure!(["Unavailable", "DeadlineExceeded"].contains(&refused.code.as_str()), "{refused:?}");
        Ok(())
    }

    /// The one step: `kms-sidecar enrol` on the node, by a copy of the program beside the one that runs, as when that
    /// runs in a static pod. No API server is there.
    fn enrol_beside(&self, token: &str) -> anyhow::Result<()> {
        let directory = self.sidecar.config.parent().context("a directory")?;
        let (copy, file) = (directory.join("copied-kms-sidecar"), directory.join("token.txt"));
        fs::copy(Program::Sidecar.path()?, &copy)?;
        fs::write(&file, token)?;
        let mut enrol = self.clock.apply_to(Command::new(copy))?;
        enrol.arg("enrol").arg("--config").arg(&self.sidecar.config).arg("--token-file").arg(&file);
        run(enrol.stdin(Stdio::null())).map(drop)
    }
}

fn pinned_roots(sidecar: &Sidecar) -> anyhow::Result<usize> {
    let pem = fs::read_to_string(sidecar.identity.join("roots.pem"))?;
    Ok(pem.matches("BEGIN CERTIFICATE").count())
}

/// What is powered off.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Off {
    Sidecar,
    Both,
}

/// For each outage and each clock a node of its own, off since today.
fn nodes_are_off(off: Off) -> anyhow::Result<()> {
    let mut world = World::start()?;
    let mut outages = Vec::new();
    for days in BY_ITSELF.into_iter().chain([TOO_LONG]) {
        for boot in Boot::ALL {
            let mut node = world.node(&format!("d{days}-{boot:?}").to_lowercase())?;
            node.sidecar.kill9()?;
            outages.push((days, boot, node));
        }
    }
    if off == Off::Both {
        world.fleet.agent.kill9()?;
    }
    for days in BY_ITSELF.into_iter().chain([TOO_LONG]) {
        match off {
            Off::Sidecar => world.advance_to(days)?,
            Off::Both => {
                world.clock.set(days * DAY)?;
                world.fleet.agent.start()?;
            }
        }
        for (_, boot, node) in outages.iter_mut().filter(|(of, ..)| *of == days) {
            node.clock.set(boot.ahead(days))?;
            node.sidecar.move_ops()?;
            node.sidecar.start()?;
            let what = format!("{off:?} off for {days} d, booted with the clock {boot:?}");
            if days == TOO_LONG {
                node.is_told_to_enrol()?;
                node.enrol_beside(&world.token_late(&node.name)?)?;
            }
            let (back, took) = timed(|| node.comes_back());
            back.context(what.clone())?;
            println!("{what}: back after {took:?}");
            node.sidecar.kill9()?;
        }
        if off == Off::Both {
            world.fleet.agent.kill9()?;
        }
    }
    Ok(())
}

#[test]
fn a_node_that_was_off_comes_back_by_itself_or_after_too_long_by_one_enrolment() -> anyhow::Result<()> {
    nodes_are_off(Off::Sidecar)
}

#[test]
fn a_site_that_was_off_comes_back_by_itself_or_after_too_long_by_one_enrolment() -> anyhow::Result<()> {
    nodes_are_off(Off::Both)
}

#[test]
fn nodes_whose_agent_was_off_come_back_by_themselves_or_after_too_long_by_one_enrolment_each()
-> anyhow::Result<()> {
    let mut world = World::start()?;
    let mut nodes = Vec::new();
    for boot in Boot::ALL {
        let mut node = world.node(&format!("{boot:?}").to_lowercase())?;
        node.sidecar.kill9()?;
        node.clock.set(boot.ahead(0))?;
        node.sidecar.start()?;
        node.comes_back()?;
        nodes.push((boot, node));
    }
    let mut today = 0;
    for days in BY_ITSELF.into_iter().chain([TOO_LONG]) {
        world.fleet.agent.kill9()?;
        today += days;
        world.clock.set(today * DAY)?;
        for (boot, node) in &nodes {
            node.clock.set(boot.ahead(today))?;
        }
        world.fleet.agent.start()?;
        for (boot, node) in &mut nodes {
            if days == TOO_LONG {
                node.is_told_to_enrol()?;
                node.enrol_beside(&world.token_late(&node.name)?)?;
            }
            let (back, took) = timed(|| node.comes_back());
            back?;
            println!("agent off for {days} d, the node's clock {boot:?}: back after {took:?}");
        }
    }
    Ok(())
}

/// A real API server on the node, off for 179 days; with `rollover`, the root is replaced on the first of them.
fn a_control_plane_is_off(rollover: bool) -> anyhow::Result<()> {
    let mut world = World::start()?;
    let Node { sidecar, clock, .. } = world.node("node")?;
    let mut plane = ControlPlane::start_unready(sidecar, EncryptionConfig::v1)?;
    plane.api.wait_ready()?;
    plane.create("before")?;
    plane.api.stop();
    plane.sidecar.kill9()?;
    if rollover {
        world.clock.set(DAY)?;
        world.fleet.kmsctl(&["ca", "rotate", "--root"])?;
    }
    ensure!(pinned_roots(&plane.sidecar)? == 1);
    world.fleet.agent.kill9()?;
    world.clock.set(179 * DAY)?;
    clock.set(179 * DAY)?;
    world.fleet.agent.start()?;

    let started = clock::monotonic();
    plane.sidecar.start()?;
    plane.api.restart_unready()?;
    wait::until("[+]kms-providers ok", START_LIMIT, || {
        let checks = plane.api.raw("/readyz?verbose").ok().map(|answer| answer.body);
        Ok(checks.filter(|checks| checks.contains("[+]kms-providers ok")).map(drop))
    })?;
    println!("179 d off, rollover {rollover}: kms-providers ok {:?} after power-on", started.elapsed());
    plane.api.wait_ready()?;
    println!("179 d off, rollover {rollover}: ready {:?} after power-on", started.elapsed());
    plane.read("before")?;
    plane.create("after")?;
    plane.read("after")?;
    let roots = if rollover { 2 } else { 1 };
    wait::until("the new root to be pinned", START_LIMIT, || {
        Ok((pinned_roots(&plane.sidecar)? == roots).then_some(()))
    })
}

#[test]
fn an_api_server_comes_back_by_itself_after_179_days() -> anyhow::Result<()> {
    a_control_plane_is_off(false)
}

#[test]
fn an_api_server_comes_back_by_itself_after_179_days_and_a_root_rollover_on_the_first_of_them()
-> anyhow::Result<()> {
    a_control_plane_is_off(true)
}

/// Nobody asks for it: five years before a root ends nodes are told of the next one, a week later it is in use.
#[test]
fn a_root_past_half_of_its_life_is_replaced_by_itself_and_nodes_follow() -> anyhow::Result<()> {
    let mut world = World::start()?;
    let half = 5 * 365 + 1;
    world.fleet.agent.stop()?;
    world.clock.set(half * DAY)?;
    world.fleet.agent.start()?;
    let mut node = world.fleet.unenrolled_sidecar(&world.cluster, "node")?;
    node.enrol(&world.token_late("node")?)?;
    node.start()?;
    node.wait_ready()?;
    let generations = || -> anyhow::Result<String> {
        let mut kmsctl = world.fleet.kmsctl_command(&["ca", "show"])?;
        run(kmsctl.env("KMSCTL_CONFIG", world.fleet.path().join("late/kmsctl.toml")).stdin(Stdio::null()))
    };
    let shown = generations()?;
    ensure!(shown.contains("prepared") && shown.contains("active in"), "{shown}");
    ensure!(pinned_roots(&node)? == 2);

    world.clock.set((half + 8) * DAY)?;
    world.fleet.agent.restart_after(Duration::ZERO)?;
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &node.socket)?;
    wait::until("the node to follow", START_LIMIT, || Ok(client.call(&["round-trip"])?.ok().ok()))?;
    let audit = world.fleet.agent.audit("changes")?;
    for action in ["ca_root_prepare", "ca_root_renew"] {
        ensure!(audit.iter().any(|line| line["action"] == action && line["who"] == "agent"), "{action}");
    }
    ensure!(pinned_roots(&node)? == 2);
    Ok(())
}

/// The agent's clock is the fleet's. While it is wrong nodes may be refused; once it is right they serve again, and
/// nobody has to do anything.
#[test]
fn an_agent_that_boots_with_a_wrong_clock_serves_as_soon_as_it_is_right() -> anyhow::Result<()> {
    let mut world = World::start()?;
    let mut node = world.node("node")?;
    for boot in [Boot::At1970, Boot::AYearAhead] {
        world.fleet.agent.kill9()?;
        world.clock.set(boot.ahead(0))?;
        world.fleet.agent.start()?;
        // At its start the node asks for the time, and believes it where the agent can prove it.
        node.sidecar.restart()?;
        node.decrypts().err().context("the node is served although the agent takes it for expired")?;
        world.clock.set(0)?;
        let (back, took) = timed(|| node.comes_back());
        back?;
        println!("the agent booted {boot:?}: the node is back {took:?} after its clock was right");
    }
    node.comes_back()
}

/// A machine that was suspended: the agent runs on with a certificate that has expired meanwhile, renews it, and the
/// node, which was suspended with it, as well. Then a clock that was a year ahead is set right.
#[test]
fn a_running_agent_renews_its_certificate_when_its_clock_jumps() -> anyhow::Result<()> {
    let world = World::start()?;
    let node = world.node("node")?;
    for days in [3, 40, 200, 40] {
        node.clock.set(days * DAY)?;
        world.advance_to(days)?;
        node.comes_back().with_context(|| format!("{days} days ahead"))?;
    }
    Ok(())
}
