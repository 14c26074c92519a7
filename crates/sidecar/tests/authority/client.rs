//! A client whose every choice of HPACK coding is a test's: it keeps the
//! dynamic table as RFC 7541 says, and beside each entry what `h2` should read.

use std::collections::VecDeque;

use proptest::prelude::*;

/// The largest table the server allows (SETTINGS_HEADER_TABLE_SIZE by default).
const TABLE_SIZE: usize = 4_096;

/// The first index of the dynamic table.
const DYNAMIC: usize = 62;

#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// A change of the table's size before the block.
    resize: Option<usize>,
    authority: Option<Field>,
    fields: Vec<Field>,
    padding: Option<u8>,
    priority: bool,
    /// Where the block is cut into frames, as parts of 255.
    cuts: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Field {
    name: String,
    value: String,
    /// 0x40 with, 0x00 without, 0x10 never indexing.
    form: u8,
    huffman_name: bool,
    huffman_value: bool,
    /// Refer to a whole entry, to a name in the dynamic table, to a static
    /// name, where there is one.
    by_entry: bool,
    by_dynamic_name: bool,
    by_static_name: bool,
}

/// What the server should make of one request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Request { authority: Option<String>, fields: Vec<(String, String)> },
    Reset,
}

struct Entry {
    name: String,
    value: String,
    /// The value in the server's table.
    rewritten: String,
}

impl Entry {
    fn size(&self) -> usize {
        32 + self.name.len() + self.value.len()
    }
}

pub(crate) struct Client {
    table: VecDeque<Entry>,
    table_size: usize,
    next_stream: u32,
}

impl Client {
    /// The client and its preface.
    pub(crate) fn new() -> (Self, Vec<u8>) {
        let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        frame(&mut preface, 4, 0, 0, b"");
        (Self { table: VecDeque::new(), table_size: TABLE_SIZE, next_stream: 1 }, preface)
    }

    /// Writes one request without a body.
    pub(crate) fn send(&mut self, request: &Request, output: &mut Vec<u8>) -> Expected {
        let mut block = Vec::new();
        if let Some(size) = request.resize {
            self.table_size = size;
            self.evict(size);
            integer(&mut block, 0x20, 5, size);
        }
        block.extend_from_slice(b"\x83\x86\x84"); // POST, http, /
        let authority = request.authority.as_ref().map(|field| self.field(field, &mut block));
        let mut fields = Vec::new();
        for field in &request.fields {
            fields.push((field.name.clone(), self.field(field, &mut block)));
        }
        fields.sort();
        let stream = self.next_stream;
        self.next_stream += 2;
        frames(request, stream, &block, output);
        match &authority {
            Some(value) if value.contains(['/', '%']) => Expected::Reset,
            _ => Expected::Request { authority, fields },
        }
    }

    /// Writes one field; returns the value that the server should read.
    fn field(&mut self, field: &Field, block: &mut Vec<u8>) -> String {
        let same = |entry: &Entry| entry.name == field.name && entry.value == field.value;
        if let Some(position) = self.table.iter().position(same).filter(|_| field.by_entry) {
            integer(block, 0x80, 7, DYNAMIC + position);
            return self.table[position].rewritten.clone();
        }
        let named = self.table.iter().position(|entry| entry.name == field.name);
        let bits = if field.form == 0x40 { 6 } else { 4 };
        let mut rewritten = field.value.clone();
        match named.filter(|_| field.by_dynamic_name) {
            Some(position) => integer(block, field.form, bits, DYNAMIC + position),
            None => {
                if field.name == ":authority" {
                    rewritten = "k".to_owned();
                }
                match static_name(&field.name).filter(|_| field.by_static_name) {
                    Some(index) => integer(block, field.form, bits, index),
                    None => {
                        block.push(field.form);
                        text(block, &field.name, field.huffman_name);
                    }
                }
            }
        }
        text(block, &field.value, field.huffman_value);
        if field.form == 0x40 {
            let entry =
                Entry { name: field.name.clone(), value: field.value.clone(), rewritten: rewritten.clone() };
            self.evict(self.table_size.saturating_sub(entry.size()));
            if entry.size() <= self.table_size {
                self.table.push_front(entry);
            }
        }
        rewritten
    }

    fn evict(&mut self, size: usize) {
        while self.table.iter().map(Entry::size).sum::<usize>() > size {
            self.table.pop_back();
        }
    }
}

/// Writes the block as a HEADERS frame and its CONTINUATION frames.
fn frames(request: &Request, stream: u32, block: &[u8], output: &mut Vec<u8>) {
    let mut ends: Vec<usize> = request.cuts.iter().map(|cut| block.len() * usize::from(*cut) / 255).collect();
    ends.push(block.len());
    ends.sort_unstable();
    let last = ends.len() - 1;
    let mut start = 0;
    for (number, end) in ends.into_iter().enumerate() {
        let part = &block[start..end];
        start = end;
        let end_headers = if number == last { 0x4 } else { 0 };
        if number > 0 {
            frame(output, 9, end_headers, stream, part);
            continue;
        }
        let (mut payload, mut flags) = (Vec::new(), 0x1 | end_headers);
        if let Some(padding) = request.padding {
            payload.push(padding);
            flags |= 0x8;
        }
        if request.priority {
            payload.extend_from_slice(&[0, 0, 0, 0, 15]);
            flags |= 0x20;
        }
        payload.extend_from_slice(part);
        payload.extend(std::iter::repeat_n(0, request.padding.unwrap_or(0).into()));
        frame(output, 1, flags, stream, &payload);
    }
}

fn frame(output: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    output.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes()[1..]);
    output.extend_from_slice(&[kind, flags]);
    output.extend_from_slice(&stream.to_be_bytes());
    output.extend_from_slice(payload);
}

fn integer(output: &mut Vec<u8>, pattern: u8, bits: u32, value: usize) {
    let mask = (1usize << bits) - 1;
    if value < mask {
        return output.push(pattern | u8::try_from(value).unwrap());
    }
    output.push(pattern | u8::try_from(mask).unwrap());
    let mut rest = value - mask;
    while rest >= 0x80 {
        output.push(0x80 | u8::try_from(rest % 0x80).unwrap());
        rest /= 0x80;
    }
    output.push(u8::try_from(rest).unwrap());
}

fn text(output: &mut Vec<u8>, text: &str, huffman: bool) {
    if !huffman {
        integer(output, 0, 7, text.len());
        return output.extend_from_slice(text.as_bytes());
    }
    let mut bits: Vec<u8> = text.bytes().flat_map(|byte| code(byte).bytes().map(|bit| bit - b'0')).collect();
    bits.resize(bits.len().next_multiple_of(8), 1);
    integer(output, 0x80, 7, bits.len() / 8);
    output.extend(bits.chunks(8).map(|byte| byte.iter().fold(0, |sum, bit| sum << 1 | bit)));
}

fn static_name(name: &str) -> Option<usize> {
    [(":authority", 1), ("cookie", 32), ("user-agent", 58)]
        .iter()
        .find_map(|(known, index)| (*known == name).then_some(*index))
}

/// Huffman codes (RFC 7541, appendix B) of the characters that tests use.
fn code(byte: u8) -> &'static str {
    match byte {
        b'%' => "010101",
        b'-' => "010110",
        b'.' => "010111",
        b'/' => "011000",
        b'0' => "00000",
        b'2' => "00010",
        b':' => "1011100",
        b'F' => "1100001",
        b'a' => "00011",
        b'b' => "100011",
        b'c' => "00100",
        b'e' => "00101",
        b'g' => "100110",
        b'h' => "100111",
        b'i' => "00110",
        b'k' => "1110101",
        b'm' => "101001",
        b'n' => "101010",
        b'o' => "00111",
        b'r' => "101100",
        b's' => "01000",
        b't' => "01001",
        b'u' => "101101",
        b'x' => "1111001",
        b'y' => "1111010",
        other => panic!("no code for {other}"),
    }
}

/// Requests with few distinct names and values, so that the table is used, and
/// with sizes that overflow it.
pub(crate) fn requests() -> impl Strategy<Value = Vec<Request>> {
    proptest::collection::vec(request(), 1..12)
}

fn request() -> impl Strategy<Value = Request> {
    let size = prop_oneof![2 => 0..200usize, 1 => 0..=TABLE_SIZE];
    let cut = proptest::collection::vec(any::<u8>(), 0..7);
    let name = prop_oneof![
        Just("x-a".to_owned()),
        Just("x-b".to_owned()),
        Just("cookie".to_owned()),
        Just("user-agent".to_owned())
    ];
    (
        proptest::option::weighted(0.2, size),
        proptest::option::weighted(0.95, field(Just(":authority".to_owned()))),
        proptest::collection::vec(field(name), 0..6),
        proptest::option::weighted(0.3, any::<u8>()),
        any::<bool>(),
        prop_oneof![Just(Vec::new()), cut],
    )
        .prop_map(|(resize, authority, fields, padding, priority, cuts)| Request {
            resize,
            authority,
            fields,
            padding,
            priority,
            cuts,
        })
}

fn field(name: impl Strategy<Value = String>) -> impl Strategy<Value = Field> {
    let value = prop_oneof![
        4 => prop_oneof![Just("/run/kms.sock"), Just("%2Frun%2Fkms.sock"), Just("host"), Just("k")].prop_map(str::to_owned),
        2 => (1..400usize).prop_map(|length| "/x".repeat(length)),
        1 => (1..2_000usize).prop_map(|length| "y".repeat(length)),
    ];
    let form = prop_oneof![6 => Just(0x40), 1 => Just(0), 1 => Just(0x10)];
    (name, value, form, any::<[bool; 4]>(), proptest::bool::weighted(0.15)).prop_map(
        |(name, value, form, [huffman_name, huffman_value, by_entry, by_static_name], by_dynamic_name)| {
            Field {
                name,
                value,
                form,
                huffman_name,
                huffman_value,
                by_entry,
                by_dynamic_name,
                by_static_name,
            }
        },
    )
}
