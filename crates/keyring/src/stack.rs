//! Overwriting the stack that a cryptographic call has used.
//!
//! A cipher wipes its key schedule when dropped, and so does a MAC its state, but not the copies that the
//! compiler made while it moved them into place; those would stay on an idle thread's stack for as long as
//! nothing else runs there. Best effort: registers and what the kernel saved of them are out of reach.

use std::hint::black_box;

/// Overwrites the stack below the caller's frame.
///
/// What used the stack must have returned, from a function that is never inlined: only then does this frame
/// cover that one.
#[inline(never)]
pub fn burn() {
    let mut area = [0_u8; DEPTH];
    black_box(&mut area);
}

/// Deeper than the frames of AES-GCM go: in a release build they use more than 8 KiB (`tests/stack.rs` finds
/// the key with less).
const DEPTH: usize = 16 * 1024;
