//! Makes kube-apiserver's KMS v1 calls acceptable to the `h2` crate.
//!
//! kube-apiserver sends the socket's path as `:authority`, as it is or
//! percent-encoded. `h2` takes neither for an authority and resets the stream.
//! Between the unix listener and `h2`, [`AuthorityRewrite`] therefore replaces
//! each literal value of `:authority` by one byte.
//!
//! This works without knowing the connection's HPACK state. What counts for the
//! dynamic table is the *decoded* length of a value (RFC 7541, section 4.1),
//! and no valid, non-empty value decodes to less than the one byte that stands
//! in its place. So entries of `h2`'s table are never larger than the client's,
//! the client's table is always a prefix (newest first) of `h2`'s, and every
//! index that the client uses names the same entry on both sides.
//!
//! Architecture invariant: nothing here reads, keeps or changes any other
//! field, any body, or anything that the server sends. What this module does
//! not understand it leaves for `h2` to judge.

mod frames;
mod io;

pub use self::frames::{FrameError, Framer, MAX_BLOCK, MAX_BLOCK_FRAMES};
pub use self::io::AuthorityRewrite;

/// The static-table index of `:authority` (RFC 7541, appendix A).
const STATIC_AUTHORITY: usize = 1;

/// `:authority` as a plain HPACK string and in Huffman code.
const NAME: &[u8] = b"\x0a:authority";
const NAME_HUFFMAN: &[u8] = b"\x88\xb8\x3b\x53\x39\xec\x32\x7d\x7f";

/// What stands in place of a value: an HPACK string of one byte. Any valid
/// authority would do; nothing reads it.
const REPLACEMENT: &[u8] = b"\x01k";

/// The most octets that may follow the first one of an HPACK integer here.
/// Values stay below 2^28, and a block has at most 2^14 bytes.
const MAX_INTEGER_OCTETS: usize = 4;

/// Returns the header block with each literal, non-empty value of `:authority`
/// replaced.
///
/// Left as they are: a field whose name is an index into the dynamic table
/// (that would need state; grpc-go and grpcio never send it), an empty value,
/// and a Huffman value that has no symbol in it. `None` if the block does not
/// parse: it must go on unchanged, for `h2` to refuse.
pub fn rewrite_block(block: &[u8]) -> Option<Vec<u8>> {
    let mut output = Vec::with_capacity(block.len());
    let mut rest = block;
    while !rest.is_empty() {
        let field = rest;
        let value_offset = take_field(&mut rest)?;
        match value_offset {
            Some(offset) => {
                output.extend_from_slice(field.get(..offset)?);
                output.extend_from_slice(REPLACEMENT);
            }
            None => output.extend_from_slice(field.get(..field.len() - rest.len())?),
        }
    }
    Some(output)
}

/// Takes one field. Returns where its value begins if that is to be replaced,
/// and `Some(None)` if the field stays as it is.
fn take_field(rest: &mut &[u8]) -> Option<Option<usize>> {
    let field = *rest;
    let index_bits = match field.first()? {
        0x80.. => return take_integer(rest, 7).map(|_indexed_field| None),
        0x40.. => 6,
        0x20.. => return take_integer(rest, 5).map(|_table_size| None),
        _ => 4,
    };
    let is_authority = match take_integer(rest, index_bits)? {
        0 => {
            let before = *rest;
            take_text(rest)?;
            let name = before.get(..before.len() - rest.len())?;
            name == NAME || name == NAME_HUFFMAN
        }
        index => index == STATIC_AUTHORITY,
    };
    let value_offset = field.len() - rest.len();
    let value = take_text(rest)?;
    Some((is_authority && value.has_symbols()).then_some(value_offset))
}

/// An HPACK string, still in its coding.
struct Text<'a> {
    is_huffman: bool,
    bytes: &'a [u8],
}

impl Text<'_> {
    /// Whether the string may decode to something. A Huffman string of `ff`
    /// bytes alone is padding: no symbol's code begins with eight ones.
    fn has_symbols(&self) -> bool {
        match self.is_huffman {
            true => self.bytes.iter().any(|byte| *byte != 0xff),
            false => !self.bytes.is_empty(),
        }
    }
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<Text<'a>> {
    let is_huffman = rest.first()? & 0x80 != 0;
    let length = take_integer(rest, 7)?;
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(Text { is_huffman, bytes })
}

/// Takes an integer with a prefix of `prefix` bits (RFC 7541, section 5.1).
fn take_integer(rest: &mut &[u8], prefix: u32) -> Option<usize> {
    let mask = (1usize << prefix) - 1;
    let (first, mut after) = rest.split_first()?;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        for octet in 0..=MAX_INTEGER_OCTETS {
            if octet == MAX_INTEGER_OCTETS {
                return None;
            }
            let (next, tail) = after.split_first()?;
            after = tail;
            value += usize::from(next & 0x7f) << (7 * octet);
            if next & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = after;
    Some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rewritten(block: &[u8]) -> Vec<u8> {
        rewrite_block(block).expect("the block parses")
    }

    #[test]
    fn a_literal_with_the_static_name_is_rewritten_in_all_three_forms() {
        assert_eq!(rewritten(b"\x41\x05/k.so"), b"\x41\x01k");
        assert_eq!(rewritten(b"\x01\x05/k.so"), b"\x01\x01k");
        assert_eq!(rewritten(b"\x11\x05/k.so"), b"\x11\x01k");
    }

    #[test]
    fn a_name_that_is_spelled_out_is_rewritten_plain_and_in_huffman_code() {
        assert_eq!(rewritten(b"\x40\x0a:authority\x02/k"), b"\x40\x0a:authority\x01k");
        assert_eq!(
            rewritten(b"\x40\x88\xb8\x3b\x53\x39\xec\x32\x7d\x7f\x02/k"),
            b"\x40\x88\xb8\x3b\x53\x39\xec\x32\x7d\x7f\x01k"
        );
    }

    #[test]
    fn a_huffman_value_is_rewritten_unless_it_is_padding_only() {
        assert_eq!(rewritten(b"\x41\x82\x60\xff"), b"\x41\x01k");
        assert_eq!(rewritten(b"\x41\x82\xff\xff"), b"\x41\x82\xff\xff");
        assert_eq!(rewritten(b"\x41\x80"), b"\x41\x80");
    }

    #[test]
    fn other_fields_and_empty_values_are_left_alone() {
        let block = b"\x83\x86\x3f\xe1\x1f\x44\x03/a/\x41\x00\xbe\x40\x01x\x02/y";
        assert_eq!(rewritten(block), block);
    }

    #[test]
    fn a_dynamic_name_index_is_left_alone() {
        assert_eq!(rewritten(b"\x7e\x02/k"), b"\x7e\x02/k");
    }

    #[test]
    fn a_block_that_does_not_parse_is_not_rewritten() {
        for block in
            [&b"\x41"[..], b"\x41\x05/k", b"\xff", b"\xff\xff\xff\xff\xff\x7f", b"\x40\x0a:auth", b"\x41\x7f"]
        {
            assert_eq!(rewrite_block(block), None, "{block:x?}");
        }
    }

    #[test]
    fn a_long_value_with_a_long_length_is_rewritten() {
        let mut block = b"\x41\x7f\xe1\x09".to_vec();
        block.extend_from_slice(&[b'/'; 127 + 0x61 + (9 << 7)]);
        block.push(0x83);
        assert_eq!(rewritten(&block), b"\x41\x01k\x83");
    }

    proptest! {
        #[test]
        fn a_rewrite_is_never_longer_and_changes_nothing_the_second_time(
            block in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0x41), Just(0x01), Just(0x02)], 0..64)
        ) {
            if let Some(once) = rewrite_block(&block) {
                prop_assert!(once.len() <= block.len());
                prop_assert_eq!(rewrite_block(&once), Some(once));
            }
        }
    }
}
