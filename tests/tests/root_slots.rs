//! Root slots, the store key's rotation and `kms-agent lock` with real programs; and, as root, a look into the memory
//! of a real agent.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, ensure};
use data_encoding::{BASE64, HEXLOWER};
use fleet_kms_keyring::sealed::{self, Kind, SealContext};
use fleet_kms_keyring::{StoreId, aead};
use fleet_kms_seal::{FileSlot, RootSlot as _, SlotRecord};
use fleet_kms_store::{RowName, SqliteStore, Store as _};
use fleet_kms_tests::fleet::{Fleet, until_true};
use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;
use fleet_kms_tests::wait::START_LIMIT;

fn slot_ids(fleet: &Fleet) -> anyhow::Result<Vec<(String, String)>> {
    let listed = fleet.host(&["slot", "list"])?;
    let slots = listed.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    });
    Ok(slots.collect())
}

/// Gives a passphrase on descriptor 3.
fn with_passphrase(fleet: &Fleet, passphrase: &str, args: &[&str]) -> anyhow::Result<String> {
    let file = fleet.path().join("passphrase");
    fs::write(&file, passphrase)?;
    let agent = fleet.host_command(args)?;
    let mut shell = std::process::Command::new("sh");
    shell.arg("-c").arg(r#"exec "$@" 3<"$0""#).arg(&file).arg(agent.get_program()).args(agent.get_args());
    fleet_kms_tests::child::run(shell.stdin(Stdio::null()))
}

#[test]
fn a_removed_slot_never_opens_the_store_again_and_what_was_wrapped_still_opens() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let sidecar = fleet.sidecar(&cluster, "cp-1")?;
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)?;
    let value = client.call(&["encrypt"])?.last()?.to_string();
    let second = fleet.agent.directory.join("second.key");
    let second = second.to_str().context("a path in UTF-8")?;
    fleet.host(&["slot", "add", "file", second])?;
    let opened = fleet.host(&["slot", "test", "--root-file", second])?;
    let id = opened.trim().rsplit(' ').next().context("an id")?.to_owned();
    with_passphrase(&fleet, "correct horse battery", &["slot", "add", "passphrase", "--passphrase-fd", "3"])?;
    let wrong = with_passphrase(&fleet, "wrong horse battery", &["slot", "test", "--passphrase-fd", "3"]);
    let wrong = wrong.unwrap_err().to_string();
    ensure!(wrong.contains("no slot opens with this passphrase"), "{wrong}");

    let refused = fleet.host(&["slot", "remove", &id]).unwrap_err().to_string();
    ensure!(refused.contains("--passphrase-fd"), "{refused}");
    let removed = fleet.host(&["slot", "remove", &id, "--new-passphrase", "--compromised"])?;
    ensure!(removed.contains("rotated 1 clusters fresh"), "{removed}");
    let line =
        removed.lines().find(|line| line.starts_with("new recovery passphrase: ")).context("a passphrase")?;
    let passphrase = line.rsplit(' ').next().context("a passphrase")?.to_owned();
    let rotated = || Ok(fleet.agent.log()?.contains("the older key is gone"));
    until_true("the end of the store key's rotation", START_LIMIT, rotated)?;
    // Nobody has typed the new passphrase yet.
    let last = slot_ids(&fleet)?.into_iter().find(|(_, kind)| kind == "file").context("a file slot")?.0;
    let refused = fleet.host(&["slot", "remove", &last, "--new-passphrase"]).unwrap_err().to_string();
    ensure!(refused.contains("last one known to open the store"), "{refused}");
    client.call(&["decrypt", "-answer", &value])?.ok()?;
    fleet.host(&["slot", "test", "--root-file", second]).unwrap_err();
    with_passphrase(&fleet, &passphrase, &["slot", "test", "--passphrase-fd", "3"])?;
    with_passphrase(&fleet, "correct horse battery", &["slot", "test", "--passphrase-fd", "3"]).unwrap_err();
    fleet.agent.stop()?;
    ensure!(fleet.host(&["check-store"])?.contains("each as the last transaction left it"));
    // Offline, too.
    assert_eq!(slot_ids(&fleet)?.len(), 2);
    fleet.agent.start()?;
    until_true("the sidecar's link", START_LIMIT, || {
        Ok(client.call(&["decrypt", "-answer", &value])?.ok().is_ok())
    })
}

#[test]
fn a_store_key_rotation_that_a_crash_cuts_off_goes_on_at_the_next_start() -> anyhow::Result<()> {
    let mut fleet = Fleet::start()?;
    for n in 0..20 {
        fleet.cluster(&format!("c{n}"))?;
    }
    let second = fleet.agent.directory.join("second.key");
    let second = second.to_str().context("a path in UTF-8")?;
    fleet.host(&["slot", "add", "file", second])?;
    let opened = fleet.host(&["slot", "test", "--root-file", second])?;
    let id = opened.trim().rsplit(' ').next().context("an id")?.to_owned();
    fleet.host(&["slot", "remove", &id, "--new-passphrase"])?;
    fleet.agent.kill9()?;
    fleet.agent.start()?;
    let rotated = || Ok(fleet.agent.log()?.contains("the older key is gone"));
    until_true("the end of the store key's rotation", START_LIMIT, rotated)?;
    fleet.agent.stop()?;
    ensure!(fleet.host(&["check-store"])?.contains("each as the last transaction left it"));
    fleet.host(&["slot", "test", "--root-file", second]).unwrap_err();
    fleet.agent.start()
}

/// Keys that an agent has, as its own store and root slot tell.
struct Keys {
    store_key: [u8; 32],
    kek: [u8; 32],
}

/// Opens a backup with the root slot.
async fn keys(fleet: &Fleet, cluster: &str) -> anyhow::Result<Keys> {
    let backup = fleet.path().join("look.db");
    fleet.host(&["backup", backup.to_str().context("a path in UTF-8")?])?;
    let store = SqliteStore::open_read_only(&backup)?;
    let row = |name: String| RowName::try_from(name);
    let meta = store.get(&row("meta".to_owned())?).await?.context("meta")?;
    let id = StoreId::from_bytes(meta.bytes.get(1..).context("an id")?.try_into()?);
    let root_file = fleet.agent.directory.join("root.key");
    let root: [u8; 32] =
        HEXLOWER.decode(fs::read_to_string(&root_file)?.trim().as_bytes())?.as_slice().try_into()?;
    let (slot, mut found) = (FileSlot::open(&root_file)?, None);
    for row in store.page_rows("slot/", None, 10).await? {
        let record = SlotRecord::parse(&row.bytes)?;
        if let Ok(key) = slot.open(&record, id) {
            found = Some((key, row.bytes));
        }
    }
    let (key, slot) = found.context("a slot that opens")?;
    let (frame, sealed) = slot.split_at(slot.len() - aead::NONCE_LEN - 32 - aead::TAG_LEN);
    let aad = [b"fleet-kms/slot/1".as_slice(), id.as_bytes(), frame].concat();
    let store_key = aead::open(&root, &aad, sealed).ok().context("the slot's frame")?;
    let name = row(format!("kek/{cluster}/0000000001"))?;
    let kek = store.get(&name).await?.context("a KEK")?;
    let context = SealContext { store: id, row: name.as_bytes(), kind: Kind::Kek, epoch: key.epoch() };
    let kek = sealed::open(&key.seal_key(), &context, &kek.bytes).ok().context("the KEK opens")?;
    Ok(Keys { store_key: store_key.as_slice().try_into()?, kek: kek.as_slice().try_into()? })
}

/// How often each pattern is in the readable memory of a process.
fn count_in_memory(pid: u32, patterns: &[&[u8]]) -> anyhow::Result<Vec<usize>> {
    const LARGEST: u64 = 1 << 30;
    const PAGE: usize = 4096;
    const ZEROS: [u8; PAGE] = [0; PAGE];
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut counts = vec![0; patterns.len()];
    let mut read_bytes = 0;
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with('r'))) {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a range")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        let mut region = vec![0; usize::try_from((to - from).min(LARGEST))?];
        // [vvar] and the like cannot be read.
        if memory.seek(SeekFrom::Start(from)).is_err() || memory.read_exact(&mut region).is_err() {
            continue;
        }
        read_bytes += region.len();
        // Most pages are empty, and comparing one with zeros is quick.
        for start in (0..region.len()).step_by(PAGE) {
            let page = region.get(start..region.len().min(start + PAGE)).unwrap_or_default();
            if page == ZEROS.get(..page.len()).unwrap_or_default() {
                continue;
            }
            for (count, pattern) in counts.iter_mut().zip(patterns) {
                // A pattern may go on in the next page; none begins in zeros.
                let end = region.len().min(start + PAGE + pattern.len() - 1);
                let windows = region.get(start..end).unwrap_or_default().windows(pattern.len());
                *count += windows.filter(|window| window == pattern).count();
            }
        }
    }
    ensure!(read_bytes > 1 << 20, "only {read_bytes} bytes could be read");
    Ok(counts)
}

/// The round keys of AES-256 after the key itself (FIPS 197, section 5.2).
#[expect(clippy::indexing_slicing, reason = "the standard counts words and bytes, and so does this")]
fn aes256_schedule(key: &[u8; 32]) -> Vec<u8> {
    let multiply = |mut a: u8, mut b: u8| {
        let mut product = 0;
        while b != 0 {
            product ^= if b & 1 == 1 { a } else { 0 };
            a = (a << 1) ^ if a & 0x80 == 0 { 0 } else { 0x1b };
            b >>= 1;
        }
        product
    };
    let substitute = |byte: u8| {
        let inverse = (0..=255).find(|other| multiply(byte, *other) == 1).unwrap_or(0);
        (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
    };
    let mut words: Vec<[u8; 4]> = key.as_chunks::<4>().0.to_vec();
    let mut round = 1;
    for i in 8..60 {
        let mut word = words[i - 1];
        if i % 8 == 0 {
            word.rotate_left(1);
            word = word.map(substitute);
            word[0] ^= round;
            round = multiply(round, 2);
        } else if i % 8 == 4 {
            word = word.map(substitute);
        }
        let before = words[i - 8];
        words.push(std::array::from_fn(|byte| word[byte] ^ before[byte]));
    }
    words.split_off(8).concat()
}

#[test]
fn the_key_schedule_of_this_test_is_that_of_the_standard() {
    // FIPS 197, appendix A.3.
    let key = HEXLOWER.decode(b"603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4").unwrap();
    let schedule = aes256_schedule(&key.try_into().unwrap());
    assert_eq!(HEXLOWER.encode(&schedule[..8]), "9ba354118e6925af");
    assert_eq!(HEXLOWER.encode(&schedule[204..]), "706c631e");
}

fn files_below(directory: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else if entry.file_type()?.is_file() {
            files.push(fs::read(entry.path())?);
        }
    }
    Ok(files)
}

#[test]
fn no_kek_is_in_the_memory_of_an_idle_agent_nor_the_store_key_once_it_is_locked_nor_in_any_file()
-> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test reads another process's memory: run it as root");
    let mut fleet = Fleet::start()?;
    let cluster = fleet.cluster("alpha")?;
    let sidecar = fleet.sidecar(&cluster, "cp-1")?;
    let client = KmsClient::new(ClientVersion::V0_37_2, Api::V1, &sidecar.socket)?;
    client.call(&["round-trip", "-sizes", "4,32"])?.ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Keys { store_key, kek } = runtime.block_on(keys(&fleet, &cluster.id))?;
    client.call(&["concurrent", "-goroutines", "8", "-calls", "50"])?.ok()?;

    let schedule = aes256_schedule(&kek);
    let pid = fleet.agent.running()?.pid();
    let (rounds, last) = (schedule.get(..32).context("rounds")?, schedule.get(176..).context("rounds")?);
    let patterns: [&[u8]; 4] = [&kek, rounds, last, &store_key];
    let found = count_in_memory(pid, &patterns)?;
    assert_eq!(found[..3], [0, 0, 0], "the KEK, and the first and last of its round keys");
    assert_eq!(found[3], 1, "the store key is in its one place: so the scan sees what is there");

    fleet.host(&["lock"])?;
    let locked = fleet.agent.ops("/readyz")?;
    ensure!(locked.status == 503 && locked.body.contains("locked"), "{locked:?}");
    ensure!(client.call(&["encrypt"])?.ok().is_err(), "a locked agent wrapped");
    assert_eq!(count_in_memory(pid, &patterns)?, [0; 4]);

    let texts = [HEXLOWER.encode(&store_key), BASE64.encode(&store_key)];
    for file in files_below(fleet.path())? {
        let has = |text: &[u8]| file.windows(text.len()).any(|window| window == text);
        ensure!(
            !has(&store_key) && !texts.iter().any(|text| has(text.as_bytes())),
            "the store key is in a file"
        );
    }
    Ok(())
}
