//! The promises of `SECURITY.md` as tests over many operations and many years:
//! what was ever wrapped can be unwrapped, and no rotation is late.
//!
//! They run on the agent's own structures, with a clock and a generator that
//! they set; the programs themselves are run in `tests/tests`.

pub(crate) mod rig;
mod model;
mod operations;
mod random_operations;
mod years;
