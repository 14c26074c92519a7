//! Any bytes a client may send: the rewrite does not panic, is never longer,
//! is the same for any split, and changes nothing the second time.
#![no_main]

use fleet_kms_sidecar::authority::{FrameError, Framer};
use libfuzzer_sys::fuzz_target;

fn run<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, Result<(), FrameError>) {
    let (mut framer, mut output) = (Framer::new(), Vec::new());
    let end = pieces.into_iter().try_for_each(|piece| framer.push(piece, &mut output));
    (output, end)
}

fuzz_target!(|bytes: &[u8]| {
    let size = bytes.len() % 61 + 1;
    let whole = run(std::iter::once(bytes));
    assert!(whole.0.len() <= bytes.len());
    assert_eq!(run(bytes.chunks(size)), whole);
    assert_eq!(run(std::iter::once(&whole.0[..])), (whole.0.clone(), Ok(())));
});
