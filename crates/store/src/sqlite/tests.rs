//! What only the SQLite store promises: its file, its lock, its backups.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::*;
use crate::contract::{self, bytes, name, put};

fn directory() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.db");
    (directory, path)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sqlite_store_passes_the_contract() {
    let (directory, _) = directory();
    let number = AtomicUsize::new(0);
    contract::suite(async || {
        let number = number.fetch_add(1, Ordering::Relaxed);
        Arc::new(SqliteStore::create(directory.path().join(number.to_string())).unwrap()) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test]
async fn a_reopened_store_has_every_commit_and_counts_on() {
    let (_directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    let first = store.commit(put("a", b"1")).await.unwrap();
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(bytes(&store, "a").await.unwrap(), b"1");
    assert!(store.commit(put("b", b"2")).await.unwrap() > first);
    store.integrity_check().await.unwrap();
}

#[tokio::test]
async fn a_second_open_is_refused_and_names_the_holder() {
    let (directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    let pid = std::process::id();
    let refused = SqliteStore::open(&path).err().unwrap();
    assert!(matches!(refused, OpenError::InUse { pid: Some(found) } if found == pid), "{refused:?}");
    assert_eq!(refused.to_string(), format!("the store is in use by process {pid}; stop that one first"));
    let link = directory.path().join("link.db");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(SqliteStore::open(&link), Err(OpenError::InUse { .. })), "by any name");
    drop(store);
    SqliteStore::open(&link).unwrap();
}

#[tokio::test]
async fn every_file_is_private() {
    let (directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    store.commit(put("a", b"1")).await.unwrap();
    store.backup(&directory.path().join("backup.db")).await.unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(directory.path()).unwrap().map(Result::unwrap) {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["backup.db", "store.db", "store.db-shm", "store.db-wal", "store.db.lock"]);
    drop(store);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    drop(SqliteStore::open(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_store_is_created_once_and_opened_only_if_there() {
    let (_directory, path) = directory();
    assert!(matches!(SqliteStore::open(&path), Err(OpenError::NotFound)));
    drop(SqliteStore::create(&path).unwrap());
    assert!(matches!(SqliteStore::create(&path), Err(OpenError::Exists)));
    // What an earlier crash left of a creation is no obstacle.
    fs::remove_file(&path).unwrap();
    fs::write(file::with_suffix(&path, ".new"), "half").unwrap();
    drop(SqliteStore::create(&path).unwrap());
}

#[test]
fn a_newer_format_is_refused_with_the_remedy() {
    let (_directory, path) = directory();
    drop(SqliteStore::create(&path).unwrap());
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
    for result in [SqliteStore::open(&path), SqliteStore::open_read_only(&path)] {
        let error = result.err().unwrap();
        assert!(matches!(error, OpenError::NewerFormat { found: 2, known: 1 }), "{error:?}");
        assert!(error.to_string().contains("install the newer program again"), "{error}");
    }
}

#[tokio::test]
async fn what_is_no_store_is_told_apart() {
    let (_directory, path) = directory();
    fs::write(&path, "").unwrap();
    assert!(matches!(SqliteStore::open(&path), Err(OpenError::NotADatabase)), "an empty file");
    fs::write(&path, "not a database at all".repeat(300)).unwrap();
    assert!(matches!(SqliteStore::open(&path), Err(OpenError::NotADatabase)));
    fs::remove_file(&path).unwrap();
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert!(matches!(SqliteStore::open(&path), Err(OpenError::Foreign)), "another program's database");
}

#[tokio::test]
async fn a_file_cut_short_does_not_open() {
    let (directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    for n in 0..50 {
        store.commit(put(&format!("row/{n}"), &[7; 3000])).await.unwrap();
    }
    drop(store);
    let whole = fs::read(&path).unwrap();
    for length in [0, 50, 600, 4096, 5000, 20_000, whole.len() / 4096 / 2 * 4096, whole.len() - 1] {
        let cut = directory.path().join(format!("cut-{length}"));
        fs::write(&cut, &whole[..length]).unwrap();
        let error = SqliteStore::open(&cut).err().expect("a cut file does not open");
        assert!(matches!(error, OpenError::Damaged(_) | OpenError::NotADatabase), "{length}: {error:?}");
    }
}

#[tokio::test]
async fn a_backup_is_a_store_of_its_own_made_while_commits_go_on() {
    let (directory, path) = directory();
    let store = Arc::new(SqliteStore::create(&path).unwrap());
    let before = store.commit(put("a", b"before")).await.unwrap();
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for n in 0..100_u8 {
                store.commit(put("x", &[n]).put(name("y"), vec![n])).await.unwrap();
            }
        }
    });
    let to = directory.path().join("backup.db");
    let report = store.backup(&to).await.unwrap();
    writer.await.unwrap();
    assert!(report.revision >= before);
    let copy = SqliteStore::open_read_only(&to).unwrap();
    assert_eq!(bytes(&copy, "a").await.unwrap(), b"before");
    assert_eq!(bytes(&copy, "x").await, bytes(&copy, "y").await, "no half transaction");
    let refused = copy.commit(put("a", b"")).await;
    assert!(matches!(refused, Err(CommitError::NotApplied(_))), "{refused:?}");
    drop(copy);
    assert!(!file::with_suffix(&to, "-wal").exists() && !file::with_suffix(&to, ".lock").exists());
    let restored = SqliteStore::open(&to).unwrap();
    assert!(restored.commit(put("a", b"after")).await.unwrap() > report.revision);
}

#[tokio::test]
async fn a_backup_that_fails_leaves_the_one_before() {
    let (directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    let to = directory.path().join("backup.db");
    store.backup(&to).await.unwrap();
    let good = fs::read(&to).unwrap();
    fs::create_dir(file::with_suffix(&to, ".partial")).unwrap();
    let error = store.backup(&to).await.unwrap_err();
    assert!(matches!(error, BackupError::Io { step: "creating it", .. }), "{error:?}");
    assert_eq!(fs::read(&to).unwrap(), good);
    for own in ["", "-wal", "-shm", ".lock"] {
        let refused = store.backup(&file::with_suffix(&path, own)).await;
        assert!(matches!(refused, Err(BackupError::IsTheStore)), "{own}: {refused:?}");
    }
}

#[tokio::test]
async fn a_full_database_refuses_commits_and_takes_them_again_once_there_is_room() {
    let (_directory, path) = directory();
    drop(SqliteStore::create(&path).unwrap());
    let lock = StoreLock::take(&path).unwrap();
    let connection = file::open_writer(&path).unwrap();
    connection.pragma_update(None, "max_page_count", 20).unwrap();
    let store = SqliteStore::start_with(connection, path.clone(), lock).unwrap();
    let mut kept = 0;
    let refused = loop {
        match store.commit(put(&format!("row/{kept}"), &[7; 3000]).put(name("last"), vec![kept])).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, CommitError::NotApplied(_)), "{refused:?}");
    assert!(kept > 5, "{kept} rows fitted");
    assert_eq!(bytes(&store, "last").await.unwrap(), [kept - 1], "reads go on, nothing half applied");
    assert_eq!(bytes(&store, &format!("row/{kept}")).await, None);
    store.commit(Txn::new().delete(name("row/0")).delete(name("row/1"))).await.unwrap();
    store.commit(put("row/again", &[7; 3000])).await.unwrap();
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    store.integrity_check().await.unwrap();
    assert_eq!(bytes(&store, "last").await.unwrap(), [kept - 1]);
}

#[tokio::test]
async fn a_locked_database_is_not_applied_and_works_again_afterwards() {
    let (_directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let refused = store.commit(put("a", b"1")).await;
    assert!(matches!(refused, Err(CommitError::NotApplied(_))), "{refused:?}");
    other.execute_batch("ROLLBACK").unwrap();
    store.commit(put("a", b"1").expect(name("a"), Revision::ABSENT)).await.unwrap();
}

#[tokio::test]
async fn a_row_that_is_no_row_is_corrupt_and_hurts_no_other() {
    let (_directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    store.commit(put("a", b"1")).await.unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute("INSERT INTO rows VALUES ('a b', 1, x'00')", []).unwrap();
    let page = store.page_rows("", None, 10).await;
    assert!(matches!(page, Err(ReadError::Corrupt(_))), "{page:?}");
    assert_eq!(bytes(&store, "a").await.unwrap(), b"1");
}

#[tokio::test]
async fn destroyed_bytes_leave_the_file() {
    let (_directory, path) = directory();
    let store = SqliteStore::create(&path).unwrap();
    store.commit(put("kek", b"sealed bytes of a destroyed key")).await.unwrap();
    store.commit(Txn::new().delete(name("kek"))).await.unwrap();
    drop(store);
    let file = fs::read(&path).unwrap();
    assert!(!file.windows(12).any(|bytes| bytes == b"sealed bytes"), "free pages are overwritten");
}
