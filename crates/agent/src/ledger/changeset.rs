//! What one transaction will write, gathered before it is committed.

use std::sync::Arc;

use fleet_kms_store::{Revision, Row, RowName, Txn};

use super::Keys;
use super::head::Head;
use crate::records::{Codec, Payload, Record};

struct Write {
    row: RowName,
    expected: Revision,
    old: Option<Vec<u8>>,
    new: Option<Vec<u8>>,
}

/// Rows to write, each with the revision it was read at.
pub struct Changeset {
    codec: Arc<Codec>,
    writes: Vec<Write>,
}

impl Changeset {
    pub(super) fn new(codec: Arc<Codec>) -> Self {
        Self { codec, writes: Vec::new() }
    }

    /// Adds a record that must not exist yet.
    pub fn insert<P: Payload>(&mut self, row: RowName, payload: &P) {
        let new = self.codec.encode(&row, 1, payload);
        self.writes.push(Write { row, expected: Revision::ABSENT, old: None, new: Some(new) });
    }

    /// Replaces a record's payload; refused if the row changed since.
    pub fn update<P: Payload>(&mut self, record: &Record<P>, payload: &P) {
        let new = self.codec.encode(&record.row, record.seq + 1, payload);
        self.writes.push(Write {
            row: record.row.clone(),
            expected: record.revision,
            old: Some(record.stored.clone()),
            new: Some(new),
        });
    }

    /// Removes a record; refused if the row changed since.
    pub fn delete<P: Payload>(&mut self, record: &Record<P>) {
        self.writes.push(Write {
            row: record.row.clone(),
            expected: record.revision,
            old: Some(record.stored.clone()),
            new: None,
        });
    }

    /// Adds sealed bytes in a row that must not exist yet.
    pub fn insert_sealed(&mut self, row: RowName, sealed: Vec<u8>) {
        self.writes.push(Write { row, expected: Revision::ABSENT, old: None, new: Some(sealed) });
    }

    /// Replaces a row that is not a record: a sealed blob or a slot.
    pub fn replace_sealed(&mut self, row: &Row, sealed: Vec<u8>) {
        self.writes.push(Write {
            row: row.name.clone(),
            expected: row.revision,
            old: Some(row.bytes.clone()),
            new: Some(sealed),
        });
    }

    /// Removes a row that is not a record.
    pub fn delete_sealed(&mut self, row: &Row) {
        self.writes.push(Write {
            row: row.name.clone(),
            expected: row.revision,
            old: Some(row.bytes.clone()),
            new: None,
        });
    }

    /// Says whether a row will be written or removed.
    pub(super) fn writes_to(&self, row: &RowName) -> bool {
        self.writes.iter().any(|write| write.row == *row)
    }

    /// Returns the store transaction, without the head.
    pub(super) fn txn(&self) -> Txn {
        self.writes.iter().fold(Txn::new(), |txn, write| {
            let txn = txn.expect(write.row.clone(), write.expected);
            match &write.new {
                Some(bytes) => txn.put(write.row.clone(), bytes.clone()),
                None => txn.delete(write.row.clone()),
            }
        })
    }

    /// Moves `head` from the old rows to the new ones.
    pub(super) fn toggle_elements(&self, head: &mut Head, keys: &Keys) {
        for write in &self.writes {
            for bytes in [&write.old, &write.new].into_iter().flatten() {
                head.toggle(keys, &write.row, bytes);
            }
        }
    }
}
