//! The kinds of records, by the rows that they live in: what a migration needs,
//! which knows a record by its row alone.

use fleet_kms_store::Row;

use super::{Codec, Payload, RecordError, payload};

/// One kind of record.
pub struct Kind {
    /// The row, or the prefix of the rows, which ends with `/`.
    pub rows: &'static str,
    /// The format that this release writes.
    pub format: u8,
    /// What an operator reads when such a record is damaged.
    pub what: &'static str,
    rewrite: fn(&Codec, Row) -> Result<Vec<u8>, RecordError>,
}

impl Kind {
    pub(super) const fn of<P: Payload>(rows: &'static str) -> Self {
        Self { rows, format: P::FORMAT, what: P::WHAT, rewrite: rewrite::<P> }
    }

    /// Returns a record of this kind in the format of this release, as its
    /// row's next one.
    ///
    /// # Errors
    ///
    /// When it is newer, or not what this store wrote to that row.
    pub fn rewrite(&self, codec: &Codec, row: Row) -> Result<Vec<u8>, RecordError> {
        (self.rewrite)(codec, row)
    }

    fn has(&self, row: &str) -> bool {
        if self.rows.ends_with('/') { row.starts_with(self.rows) } else { row == self.rows }
    }
}

/// All kinds.
pub fn all() -> &'static [Kind] {
    payload::KINDS
}

/// Returns the kind of the record in a row; `None` for a row that holds none,
/// or that only a later release has.
pub fn of_row(row: &str) -> Option<&'static Kind> {
    all().iter().find(|kind| kind.has(row))
}

fn rewrite<P: Payload>(codec: &Codec, row: Row) -> Result<Vec<u8>, RecordError> {
    let record = codec.decode::<P>(row)?;
    Ok(codec.encode(&record.row, record.seq + 1, &record.payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::rows;

    #[test]
    fn a_row_has_the_kind_of_its_own_prefix_and_no_other() {
        for (row, what) in [
            ("cluster/07070707-0707-0707-0707-070707070707", Some("a cluster")),
            ("cluster-name/edge-1", Some("a cluster name")),
            ("ca/root/0000000001", Some("a certificate authority")),
            (rows::ISSUED, Some("the issue number")),
            ("issued-else", None),
            ("ca-key/root/0000000001", None),
            ("kek/07070707-0707-0707-0707-070707070707/0000000001", None),
            (rows::META, None),
            (rows::HEAD, None),
        ] {
            assert_eq!(of_row(row).map(|kind| kind.what), what, "{row}");
        }
    }
}
