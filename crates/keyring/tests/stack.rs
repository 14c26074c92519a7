//! After a call, the caller's stack holds no copy of the key that the call derived.
//!
//! The whole stack of the thread is read through `/proc/self/mem` and searched for the derived key, with
//! which its key schedule begins. The agent's own memory test scans a whole process; this one names the
//! function.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;

use data_encoding::HEXLOWER;
use fleet_kms_keyring::aead;

/// The first half of the key that XAES-256-GCM derives in C2SP's second vector.
const DERIVED: &str = "e9c621d4cdd9b11b00a6427ad7e559ae";

#[test]
fn sealing_leaves_no_derived_key_on_the_stack() {
    let found = on_a_new_stack(|| {
        black_box(aead::danger_seal_with_nonce(&[3; 32], b"", b"XAES-256-GCM", b"ABCDEFGHIJKLMNOPQRSTUVWX"));
    });
    assert!(!found);
}

#[test]
fn opening_leaves_no_derived_key_on_the_stack() {
    let nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX";
    let sealed = aead::danger_seal_with_nonce(&[3; 32], b"", b"XAES-256-GCM", nonce);
    let found = on_a_new_stack(move || assert!(black_box(aead::open(&[3; 32], b"", &sealed)).is_ok()));
    assert!(!found);
}

#[test]
fn a_copy_that_is_left_on_the_stack_is_found() {
    #[inline(never)]
    fn careless() {
        // Deeper than what the search itself uses, or it would overwrite the copy.
        let mut area = [0_u8; 64 * 1024];
        HEXLOWER.decode_mut(DERIVED.as_bytes(), &mut area[..16]).unwrap();
        black_box(&area);
    }
    assert!(on_a_new_stack(careless));
}

/// Runs `call` on a thread of its own, then says whether the derived key is on that thread's stack.
fn on_a_new_stack(call: impl FnOnce() + Send + 'static) -> bool {
    let snapshot = std::thread::spawn(move || {
        call();
        own_stack()
    });
    let snapshot = snapshot.join().unwrap();
    let needle = HEXLOWER.decode(DERIVED.as_bytes()).unwrap();
    snapshot.windows(needle.len()).any(|window| window == needle)
}

fn own_stack() -> Vec<u8> {
    let marker = 0_u8;
    let address = std::ptr::from_ref(&marker).addr();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let (from, to) = maps
        .lines()
        .filter_map(|line| line.split(' ').next()?.split_once('-'))
        .map(|(from, to)| [from, to].map(|text| usize::from_str_radix(text, 16).unwrap()))
        .map(|[from, to]| (from, to))
        .find(|(from, to)| (*from..*to).contains(&address))
        .unwrap();
    let mut snapshot = vec![0; to - from];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut snapshot, from as u64).unwrap();
    snapshot
}
