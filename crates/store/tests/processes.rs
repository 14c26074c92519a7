//! What a store in another process leaves behind: killed, out of space, on a disk that cannot sync.
//!
//! The child is this test binary again, running only [`driver`], told line by line what to do.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test")]

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;
use std::{env, fs, io, thread};

use fleet_kms_store::{CommitError, OpenError, ReadError, Revision, RowName, SqliteStore, Store, Txn};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

const STORE: &str = "FLEET_KMS_TEST_STORE";
/// Marks the driver's answers among what the test harness prints.
const MARK: &str = "@ ";

/// `commit N LENGTH`, `run FROM`, `read`, `limit BYTES`: one answer each; `run` answers each commit.
#[test]
#[ignore = "the child of the other tests"]
fn driver() {
    let Some(path) = env::var_os(STORE) else { return };
    let store = SqliteStore::open(path).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    answer("ready");
    for line in io::stdin().lines().map(Result::unwrap) {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        match words[0] {
            "commit" => answer(&runtime.block_on(commit(&store, number(1), number(2)))),
            "run" => {
                for n in number(1).. {
                    answer(&runtime.block_on(commit(&store, n, 100)));
                }
            }
            "read" => answer(&runtime.block_on(last(&store))),
            "limit" => {
                let maximum = getrlimit(Resource::Fsize).maximum;
                let current = words[1].parse().ok();
                setrlimit(Resource::Fsize, Rlimit { current, maximum }).unwrap();
                answer("done");
            }
            other => panic!("{other}"),
        }
    }
}

fn answer(text: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{MARK}{text}").unwrap();
    out.flush().unwrap();
}

fn name(text: &str) -> RowName {
    RowName::try_from(text).unwrap()
}

/// Commits number `n`: three rows that belong together.
async fn commit(store: &SqliteStore, n: u64, length: u64) -> String {
    let log = name(&format!("log/{n:09}"));
    let filler = vec![7; usize::try_from(length).unwrap()];
    let txn = Txn::new().expect(log.clone(), Revision::ABSENT).put(log, filler);
    let number = n.to_string().into_bytes();
    let txn = txn.put(name("first"), number.clone()).put(name("last"), number);
    match store.commit(txn).await {
        Ok(_) => n.to_string(),
        Err(CommitError::NotApplied(_)) => "not applied".into(),
        Err(CommitError::Unknown(_)) => "unknown".into(),
        Err(other) => format!("{other:?}"),
    }
}

async fn last(store: &SqliteStore) -> String {
    match store.get(&name("last")).await {
        Ok(row) => row.map_or("absent".into(), |row| String::from_utf8(row.bytes).unwrap()),
        Err(ReadError::Unsettled(_)) => "unsettled".into(),
        Err(other) => format!("{other:?}"),
    }
}

/// Checks that the store holds the commits `0..n` whole and nothing else, and returns n.
async fn whole_commits(path: &Path) -> u64 {
    let store = SqliteStore::open(path).unwrap();
    store.integrity_check().await.unwrap();
    let mut count = 0_u64;
    let mut after = None;
    loop {
        let page = store.page_revisions("log/", after.as_ref(), 1000).await.unwrap();
        for (row, _) in &page {
            assert_eq!(row, &name(&format!("log/{count:09}")), "no commit is missing");
            count += 1;
        }
        if page.len() < 1000 {
            break;
        }
        after = page.last().map(|(row, _)| row.clone());
    }
    let expected = count.checked_sub(1).map(|n| n.to_string().into_bytes());
    for row in ["first", "last"] {
        let row = store.get(&name(row)).await.unwrap().map(|row| row.bytes);
        assert_eq!(row, expected, "no commit is torn");
    }
    count
}

struct Driver {
    child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Driver {
    fn start(store: &Path, prepare: impl FnOnce(&mut Command)) -> Self {
        // Ignored signals are inherited: a file size limit then is an error and no death.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$0\" --exact driver --ignored --nocapture"]);
        command.arg(env::current_exe().unwrap()).env(STORE, store);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut driver = Self { child, commands, answers };
        assert_eq!(driver.answer().as_deref(), Some("ready"));
        driver
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer().unwrap()
    }

    fn answer(&mut self) -> Option<String> {
        self.answers.by_ref().map(Result::unwrap).find_map(|line| {
            let (_, answer) = line.split_once(MARK)?;
            Some(answer.to_owned())
        })
    }

    /// Kills the child and returns the answers that it had given.
    fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        let left = std::iter::from_fn(|| self.answer()).collect();
        self.child.wait().unwrap();
        left
    }
}

fn new_store() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    drop(SqliteStore::create(&path).unwrap());
    (directory, path)
}

#[tokio::test]
async fn a_killed_writer_loses_no_acknowledged_commit_and_tears_none() {
    let (_directory, path) = new_store();
    let mut stored = 0;
    for round in 0..25_u64 {
        let mut driver = Driver::start(&path, |_| ());
        driver.tell(&format!("run {stored}"));
        let mut acknowledged = stored;
        for _ in 0..round * 3 {
            assert_eq!(driver.answer(), Some(acknowledged.to_string()));
            acknowledged += 1;
        }
        thread::sleep(Duration::from_micros(round * 137 % 1000));
        acknowledged += u64::try_from(driver.kill().len()).unwrap();
        stored = whole_commits(&path).await;
        assert!((acknowledged..=acknowledged + 1).contains(&stored), "{acknowledged} of {stored}");
    }
}

#[test]
fn a_store_is_refused_while_another_process_has_it() {
    let (_directory, path) = new_store();
    let driver = Driver::start(&path, |_| ());
    let error = SqliteStore::open(&path).err().unwrap();
    assert!(matches!(error, OpenError::InUse { pid: Some(pid) } if pid == driver.child.id()), "{error:?}");
    driver.kill();
    SqliteStore::open(&path).expect("a dead process holds nothing");
}

#[tokio::test]
async fn a_file_that_may_not_grow_refuses_commits_until_it_may() {
    let (_directory, path) = new_store();
    let mut driver = Driver::start(&path, |_| ());
    driver.ask("limit 65536");
    let mut n = 0;
    let refused = loop {
        match driver.ask(&format!("commit {n} 5000")) {
            answer if answer == n.to_string() => n += 1,
            answer => break answer,
        }
    };
    assert!(n > 0 && ["not applied", "unknown"].contains(&refused.as_str()), "{n}: {refused}");
    let read = driver.ask("read");
    assert!(read == "unsettled" || read == (n - 1).to_string(), "never the refused commit: {read}");
    driver.ask("limit none");
    assert_eq!(driver.ask("read"), (n - 1).to_string());
    assert_eq!(driver.ask(&format!("commit {n} 5000")), n.to_string());
    driver.kill();
    assert_eq!(whole_commits(&path).await, n + 1);
}

#[tokio::test]
async fn a_full_disk_refuses_commits_and_serves_reads() {
    let (directory, path) = new_store();
    let disk = directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    // A file system of its own, gone with the child; where that is forbidden there is nothing to see.
    let mount = "mount -t tmpfs -o size=400k tmpfs \"$1\" && cp \"$2\" \"$1/store.db\"";
    let probe = Command::new("unshare").args(["-rm", "sh", "-c", mount, "sh"]).arg(&disk).arg(&path).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("no user namespaces here: skipped");
        return;
    }
    let inside = disk.join("store.db");
    let mut driver = Driver::start(&inside, |command| {
        let program = env::current_exe().unwrap();
        let run = format!("{mount}; exec \"$0\" --exact driver --ignored --nocapture");
        let mut outer = Command::new("unshare");
        outer.args(["-rm", "sh", "-c", &run]).arg(program).arg(&disk).arg(&path).env(STORE, &inside);
        outer.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        *command = outer;
    });
    let mut n = 0;
    let refused = loop {
        match driver.ask(&format!("commit {n} 5000")) {
            answer if answer == n.to_string() => n += 1,
            answer => break answer,
        }
    };
    assert_eq!(refused, "not applied", "out of space is no riddle");
    assert_eq!(driver.ask("read"), (n - 1).to_string());
    assert_eq!(driver.ask(&format!("commit {n} 5000")), "not applied");
    driver.kill();
}

#[tokio::test]
async fn a_commit_that_could_not_be_synced_is_unknown_until_it_cannot_come_back() {
    let (directory, path) = new_store();
    let shim = directory.path().join("shim.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/fsync_fails.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&shim).arg(source).status().unwrap();
    assert!(built.success());
    let broken = directory.path().join("broken");
    let start = || {
        Driver::start(&path, |command| {
            command.env("LD_PRELOAD", &shim).env("FSYNC_FAILS", &broken);
        })
    };
    let mut driver = start();
    assert_eq!(driver.ask("commit 0 10"), "0");
    fs::write(&broken, "").unwrap();
    assert_eq!(driver.ask("commit 1 10"), "unknown");
    assert_eq!(driver.ask("read"), "unsettled");
    assert_eq!(driver.ask("commit 2 10"), "not applied", "nothing is built on what may come back");
    fs::remove_file(&broken).unwrap();
    assert_eq!(driver.ask("read"), "0", "settled: it can never come back");
    driver.kill();
    assert_eq!(whole_commits(&path).await, 1);

    // The reason for all this: unsettled, the same commit is there after a crash.
    let mut driver = start();
    assert_eq!(driver.ask("commit 1 10"), "1");
    fs::write(&broken, "").unwrap();
    assert_eq!(driver.ask("commit 2 10"), "unknown");
    driver.kill();
    fs::remove_file(&broken).unwrap();
    assert_eq!(whole_commits(&path).await, 3);
}
