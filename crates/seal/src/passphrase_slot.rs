//! A root key made from a passphrase, with Argon2id (RFC 9106).
//!
//! `parameters = memory u32 KiB ‖ passes u32 ‖ lanes u32 ‖ salt (16)`, big-endian
//!
//! Each slot has its own salt and keeps its own costs, so that later releases may ask for more. This module
//! never reads a passphrase from anywhere: its caller does, from a descriptor, a credential or a prompt, and
//! never from argv or the environment, which other processes can read.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use data_encoding::{Encoding, Specification};
use fleet_kms_keyring::{SlotId, StoreId, stack};
use rand_core::CryptoRng;
use zeroize::{Zeroize, Zeroizing};

use crate::slot::{RootSlot, SlotError};
use crate::{LockedKey, SlotKind, SlotRecord, StoreKey};

/// Fewest characters of a passphrase for a new slot.
pub const MIN_PASSPHRASE: usize = 12;

/// A passphrase, ready to seal and open.
pub struct PassphraseSlot(Zeroizing<String>);

impl PassphraseSlot {
    /// Takes the passphrase of an existing slot. Trailing line breaks are dropped: a file or a pipe adds them.
    pub fn existing(mut passphrase: Zeroizing<String>) -> Self {
        let len = passphrase.trim_end_matches(['\n', '\r']).len();
        passphrase.truncate(len);
        Self(passphrase)
    }

    /// Takes a passphrase for a new slot.
    ///
    /// # Errors
    /// [`WeakPassphrase`] if it has fewer than [`MIN_PASSPHRASE`] characters.
    pub fn new(passphrase: Zeroizing<String>) -> Result<Self, WeakPassphrase> {
        let slot = Self::existing(passphrase);
        if slot.0.chars().count() < MIN_PASSPHRASE { Err(WeakPassphrase) } else { Ok(slot) }
    }

    #[inline(never)]
    fn derive(&self, costs: &Costs, kind: SlotKind) -> Result<LockedKey, SlotError> {
        let unavailable = |source: argon2::Error| SlotError::Unavailable { kind, source: Box::new(source) };
        let params =
            Params::new(costs.memory_kib, costs.passes, costs.lanes, Some(32)).map_err(unavailable)?;
        let mut memory = vec![Block::default(); params.block_count()];
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut answer = Ok(());
        let root = LockedKey::filled(|root| {
            answer = argon2.hash_password_into_with_memory(self.0.as_bytes(), &costs.salt, root, &mut memory);
        });
        memory.zeroize();
        answer.map(|()| root).map_err(unavailable)
    }

    fn root(&self, costs: &Costs) -> Result<LockedKey, SlotError> {
        let root = self.derive(costs, self.kind());
        stack::burn();
        root
    }
}

impl RootSlot for PassphraseSlot {
    fn kind(&self) -> SlotKind {
        SlotKind::Passphrase
    }

    fn seal(&self, key: &StoreKey, slot: SlotId, rng: &mut dyn CryptoRng) -> Result<SlotRecord, SlotError> {
        let costs = Costs::of_a_new_slot(rng);
        let root = self.root(&costs)?;
        Ok(SlotRecord::seal(self.kind(), slot, costs.encode(), &root, key, rng))
    }

    fn open(&self, record: &SlotRecord, store: StoreId) -> Result<StoreKey, SlotError> {
        if record.kind() != self.kind() {
            return Err(SlotError::WrongKind { kind: self.kind(), found: record.kind() });
        }
        let costs = Costs::parse(record.parameters()).ok_or(SlotError::Parameters)?;
        record.open(store, &self.root(&costs)?)
    }
}

/// A passphrase that can be guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the passphrase is too short: use at least 12 characters, or let one be generated")]
pub struct WeakPassphrase;

/// Makes a passphrase for a recovery slot: 160 random bits, in eight groups to be written down.
pub fn generate_passphrase(rng: &mut dyn CryptoRng) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new([0; 20]);
    rng.fill_bytes(bytes.as_mut_slice());
    let text = Zeroizing::new(spelling().encode(bytes.as_slice()));
    // In one piece of the final length: growing would leave a copy behind.
    let mut out = Zeroizing::new(String::with_capacity(text.len() + text.len() / GROUP));
    for (i, c) in text.chars().enumerate() {
        if i > 0 && i % GROUP == 0 {
            out.push('-');
        }
        out.push(c);
    }
    out
}

/// What the root key of one slot costs, and its salt.
struct Costs {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    salt: [u8; 16],
}

impl Costs {
    /// RFC 9106, section 4: the second recommended option (64 MiB, 3 passes, 4 lanes).
    fn of_a_new_slot(rng: &mut dyn CryptoRng) -> Self {
        let mut salt = [0; 16];
        rng.fill_bytes(&mut salt);
        Self { memory_kib: 64 * 1024, passes: 3, lanes: 4, salt }
    }

    fn encode(&self) -> Vec<u8> {
        let numbers = [self.memory_kib, self.passes, self.lanes].map(u32::to_be_bytes);
        [numbers.as_flattened(), &self.salt].concat()
    }

    /// `None` unless well-formed and within bounds. They are not proven yet when they are spent: whoever wrote
    /// the row must not make this process use all memory or run for ever.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (numbers, salt) = bytes.split_at_checked(12)?;
        let ([memory, passes, lanes], []) = numbers.as_chunks::<4>() else { return None };
        let [memory_kib, passes, lanes] = [memory, passes, lanes].map(|number| u32::from_be_bytes(*number));
        let bounded = memory_kib <= MAX_MEMORY_KIB && passes <= MAX_PASSES && lanes <= MAX_LANES;
        bounded.then_some(Self { memory_kib, passes, lanes, salt: salt.try_into().ok()? })
    }
}

const MAX_MEMORY_KIB: u32 = 1024 * 1024;

const MAX_PASSES: u32 = 16;

const MAX_LANES: u32 = 16;

const GROUP: usize = 4;

/// Base32 without the letters i, l, o and u, which are misread.
fn spelling() -> Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("0123456789abcdefghjkmnpqrstvwxyz");
    specification.encoding().expect("32 different symbols")
}

#[cfg(test)]
mod tests {
    use std::fmt::{Debug, Display};

    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use static_assertions::assert_not_impl_any;

    use super::*;

    assert_not_impl_any!(PassphraseSlot: Clone, Debug, Display, PartialEq, serde::Serialize, AsRef<str>);

    fn text(text: &str) -> Zeroizing<String> {
        Zeroizing::new(text.to_owned())
    }

    #[test]
    fn a_passphrase_for_a_new_slot_has_12_characters() {
        assert!(PassphraseSlot::new(text("elevenchars\r\n")).is_err());
        assert!(PassphraseSlot::new(text("twelve chars")).is_ok());
        assert!(PassphraseSlot::new(text("zwölf Zeichn")).is_ok());
        assert!(WeakPassphrase.to_string().contains("at least 12 characters"));
    }

    #[test]
    fn a_generated_passphrase_is_long_enough_and_never_the_same() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let [a, b] = [generate_passphrase(&mut rng), generate_passphrase(&mut rng)];
        assert_ne!(a, b);
        assert_eq!(a.len(), 39);
        let groups: Vec<&str> = a.split('-').collect();
        assert!(groups.len() == 8 && groups.iter().all(|group| group.len() == 4), "{groups:?}");
        assert!(PassphraseSlot::new(a).is_ok());
    }

    #[test]
    fn a_new_slot_costs_64_mib_3_passes_4_lanes_and_has_its_own_salt() {
        let mut rng = ChaCha20Rng::from_seed([1; 32]);
        let [a, b] = [Costs::of_a_new_slot(&mut rng), Costs::of_a_new_slot(&mut rng)];
        assert_eq!((a.memory_kib, a.passes, a.lanes), (65_536, 3, 4));
        assert_ne!(a.salt, b.salt);
        assert_eq!(Costs::parse(&a.encode()).unwrap().encode(), a.encode());
    }

    #[test]
    fn costs_beyond_reason_are_refused_before_they_are_spent() {
        let costs = |memory_kib, passes, lanes| Costs { memory_kib, passes, lanes, salt: [0; 16] }.encode();
        assert!(Costs::parse(&costs(MAX_MEMORY_KIB, MAX_PASSES, MAX_LANES)).is_some());
        assert!(Costs::parse(&costs(MAX_MEMORY_KIB + 1, 3, 4)).is_none());
        assert!(Costs::parse(&costs(65_536, MAX_PASSES + 1, 4)).is_none());
        assert!(Costs::parse(&costs(65_536, 3, MAX_LANES + 1)).is_none());
        assert!(Costs::parse(&costs(65_536, 3, 4)[1..]).is_none());
        assert!(Costs::parse(&[]).is_none());
        let slot = PassphraseSlot::existing(text("passphrase"));
        let zero = slot.root(&Costs { memory_kib: 0, passes: 0, lanes: 0, salt: [0; 16] });
        assert!(matches!(zero, Err(SlotError::Unavailable { .. })));
    }
}
