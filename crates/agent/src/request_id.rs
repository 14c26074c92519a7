//! The id of a request, as its sender named it: in the sender's log and in
//! ours. It is text from outside, so that it is looked at before it is logged.

/// The longest id that is taken over.
const MAX: usize = 64;

/// Says whether an id may stand in a log line and a header: 1 to 64 letters,
/// digits, `-`, `_` and `.`.
pub fn is_well_formed(id: &[u8]) -> bool {
    (1..=MAX).contains(&id.len())
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_id_is_taken_over() {
        assert!(is_well_formed(b"trace-1.a_B"));
        for bad in [&b""[..], b"a b", b"a\"b", b"a\nb", &[b'a'; 65]] {
            assert!(!is_well_formed(bad));
        }
    }
}
