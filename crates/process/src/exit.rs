//! Exit statuses. They are part of the programs' interface: scripts and units tell them apart.

/// The program did its job.
pub const OK: u8 = 0;
/// It failed in a way that has no status of its own.
pub const FAILURE: u8 = 1;
/// The configuration is wrong. Nothing was bound, opened or changed; a restart changes nothing.
pub const CONFIG: u8 = 64;
/// Stored data is damaged or was written by a newer program.
pub const DATA: u8 = 65;
/// A port, path or lock is held by another process.
pub const BUSY: u8 = 69;
