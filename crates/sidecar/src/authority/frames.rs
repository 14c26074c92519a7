//! Finds the header blocks in what a client sends, without I/O.
//!
//! It must never hold more than one header block, and never change the order or
//! the payload of any frame but HEADERS and CONTINUATION.

use super::rewrite_block;

/// The client's connection preface (RFC 9113, section 3.4), which `h2` checks.
const PREFACE_LENGTH: usize = 24;

const FRAME_HEADER_LENGTH: usize = 9;

/// The most bytes of one HEADERS payload, over all its CONTINUATION frames and
/// without padding. This is HTTP/2's smallest frame limit, which our server
/// does not raise, so that a block always fits the one frame it goes on in.
/// kube-apiserver's blocks have about 200 bytes.
pub const MAX_BLOCK: usize = 16_384;

/// The most frames that one header block may come in.
pub const MAX_BLOCK_FRAMES: usize = 8;

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;

const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The length of a HEADERS frame's priority fields.
const PRIORITY_LENGTH: usize = 5;

/// Why a client's bytes cannot go on; the connection must close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A HEADERS or CONTINUATION frame, or a whole block, is over the limit.
    #[error("a header block is longer than {MAX_BLOCK} bytes")]
    BlockTooLong,
    /// The block came in more than [`MAX_BLOCK_FRAMES`] frames.
    #[error("a header block comes in more than {MAX_BLOCK_FRAMES} frames")]
    TooManyFrames,
    /// Something other than its own CONTINUATION came after an open block.
    #[error("a header block is interrupted by another frame")]
    Interrupted,
    /// A HEADERS frame is shorter than its flags say.
    #[error("a headers frame has less in it than its flags say")]
    Malformed,
}

/// Rewrites a client's byte stream, piece by piece.
///
/// How the stream is cut into pieces makes no difference to what comes out.
#[derive(Debug)]
pub struct Framer {
    state: State,
    /// The frame that is being collected: its header, then its payload.
    frame: Vec<u8>,
    block: Option<OpenBlock>,
}

#[derive(Debug)]
enum State {
    /// So many bytes go on as they are; then a frame header follows.
    Pass(usize),
    /// `frame` is being filled up to a frame header.
    FrameHeader,
    /// `frame` is being filled up to so many bytes.
    Payload(usize),
    Failed(FrameError),
}

impl Framer {
    /// Starts before the client's preface.
    pub fn new() -> Self {
        Self { state: State::Pass(PREFACE_LENGTH), frame: Vec::new(), block: None }
    }

    /// Takes the next bytes of the client and appends to `output` what `h2`
    /// shall read.
    ///
    /// After an error, what is already in `output` is still good, and every
    /// further call fails alike.
    pub fn push(&mut self, mut input: &[u8], output: &mut Vec<u8>) -> Result<(), FrameError> {
        while !input.is_empty() {
            match self.state {
                State::Pass(length) => {
                    let passed = take(&mut input, length);
                    output.extend_from_slice(passed);
                    self.state = match length - passed.len() {
                        0 => State::FrameHeader,
                        left => State::Pass(left),
                    };
                }
                State::FrameHeader => {
                    let missing = FRAME_HEADER_LENGTH - self.frame.len();
                    self.frame.extend_from_slice(take(&mut input, missing));
                    if let Some(header) = FrameHeader::parse(&self.frame) {
                        self.state = self.begin(header, output);
                    }
                }
                State::Payload(length) => {
                    let missing = length - self.frame.len();
                    self.frame.extend_from_slice(take(&mut input, missing));
                }
                State::Failed(error) => return Err(error),
            }
            self.end_if_complete(output);
        }
        match self.state {
            State::Failed(error) => Err(error),
            State::Pass(_) | State::FrameHeader | State::Payload(_) => Ok(()),
        }
    }

    /// Decides what becomes of the frame whose header has just arrived.
    fn begin(&mut self, header: FrameHeader, output: &mut Vec<u8>) -> State {
        let belongs_to_block = match (&self.block, header.kind) {
            (Some(block), CONTINUATION) => header.stream == block.header.stream,
            (Some(_), _) => false,
            (None, HEADERS) => true,
            (None, _) => {
                output.append(&mut self.frame);
                return match header.length {
                    0 => State::FrameHeader,
                    length => State::Pass(length),
                };
            }
        };
        if !belongs_to_block {
            State::Failed(FrameError::Interrupted)
        } else if header.length > MAX_BLOCK {
            State::Failed(FrameError::BlockTooLong)
        } else {
            State::Payload(FRAME_HEADER_LENGTH + header.length)
        }
    }

    /// Takes a collected frame into its block, and hands the block on when that
    /// was its last frame.
    fn end_if_complete(&mut self, output: &mut Vec<u8>) {
        if !matches!(self.state, State::Payload(length) if length == self.frame.len()) {
            return;
        }
        self.state = match self.end(output) {
            Ok(()) => State::FrameHeader,
            Err(error) => State::Failed(error),
        };
        self.frame.clear();
    }

    fn end(&mut self, output: &mut Vec<u8>) -> Result<(), FrameError> {
        let header = FrameHeader::parse(&self.frame).ok_or(FrameError::Malformed)?;
        let payload = self.frame.get(FRAME_HEADER_LENGTH..).ok_or(FrameError::Malformed)?;
        let block = match self.block.take() {
            None => OpenBlock::begin(header, payload)?,
            Some(open) => open.extend(payload)?,
        };
        match header.flags & END_HEADERS {
            0 => self.block = Some(block),
            _ => block.write(output),
        }
        Ok(())
    }
}

impl Default for Framer {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Clone, Copy)]
struct FrameHeader {
    length: usize,
    kind: u8,
    flags: u8,
    /// The stream with the reserved bit as the client sent it.
    stream: [u8; 4],
}

impl FrameHeader {
    /// `None` as long as the header is incomplete.
    fn parse(frame: &[u8]) -> Option<Self> {
        let [l0, l1, l2, kind, flags, stream @ ..] = *frame.first_chunk::<FRAME_HEADER_LENGTH>()?;
        let length = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        Some(Self { length, kind, flags, stream })
    }
}

/// A header block whose last frame has not arrived.
#[derive(Debug)]
struct OpenBlock {
    /// The HEADERS frame's, its flags without PADDED.
    header: FrameHeader,
    frames: usize,
    /// The priority fields, if any, and the block so far.
    payload: Vec<u8>,
}

impl OpenBlock {
    fn begin(mut header: FrameHeader, payload: &[u8]) -> Result<Self, FrameError> {
        let unpadded = if header.flags & PADDED == 0 {
            payload
        } else {
            let (pad, rest) = payload.split_first().ok_or(FrameError::Malformed)?;
            let length = rest.len().checked_sub(usize::from(*pad)).ok_or(FrameError::Malformed)?;
            rest.get(..length).ok_or(FrameError::Malformed)?
        };
        header.flags &= !PADDED;
        let open = Self { header, frames: 1, payload: unpadded.to_vec() };
        match open.payload.len() < open.priority_length() {
            true => Err(FrameError::Malformed),
            false => Ok(open),
        }
    }

    fn extend(mut self, fragment: &[u8]) -> Result<Self, FrameError> {
        self.frames += 1;
        if self.frames > MAX_BLOCK_FRAMES {
            return Err(FrameError::TooManyFrames);
        }
        if self.payload.len() + fragment.len() > MAX_BLOCK {
            return Err(FrameError::BlockTooLong);
        }
        self.payload.extend_from_slice(fragment);
        Ok(self)
    }

    fn priority_length(&self) -> usize {
        match self.header.flags & PRIORITY {
            0 => 0,
            _ => PRIORITY_LENGTH,
        }
    }

    /// Writes the whole block as one HEADERS frame.
    fn write(&self, output: &mut Vec<u8>) {
        let (priority, block) = self.payload.split_at(self.priority_length());
        let rewritten = rewrite_block(block);
        let block = rewritten.as_deref().unwrap_or(block);
        let length = u32::try_from(priority.len() + block.len()).expect("a block is below MAX_BLOCK");
        let [_, length @ ..] = length.to_be_bytes();
        output.extend_from_slice(&length);
        output.extend_from_slice(&[HEADERS, self.header.flags | END_HEADERS]);
        output.extend_from_slice(&self.header.stream);
        output.extend_from_slice(priority);
        output.extend_from_slice(block);
    }
}

/// Takes up to `most` bytes from the front of `input`.
fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    taken
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// What comes out after the preface, and how it ended.
    fn run<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Result<(), FrameError>) {
        let mut framer = Framer::new();
        let mut output = Vec::new();
        framer.push(PREFACE, &mut output).unwrap();
        output.clear();
        let end = pieces.into_iter().try_for_each(|piece| framer.push(piece, &mut output));
        (output, end)
    }

    #[test]
    fn a_path_as_authority_is_rewritten_and_the_length_fits() {
        let (output, end) = run([&frame(HEADERS, END_HEADERS | 1, 1, b"\x83\x41\x09/kms.sock\x86")[..]]);
        assert_eq!(output, frame(HEADERS, END_HEADERS | 1, 1, b"\x83\x41\x01k\x86"));
        assert_eq!(end, Ok(()));
    }

    #[test]
    fn padding_is_dropped_and_priority_kept() {
        let payload = b"\x03\x80\x00\x00\x00\x10\x41\x02/k\x00\x00\x00";
        let (output, end) = run([&frame(HEADERS, END_HEADERS | PADDED | PRIORITY, 3, payload)[..]]);
        assert_eq!(output, frame(HEADERS, END_HEADERS | PRIORITY, 3, b"\x80\x00\x00\x00\x10\x41\x01k"));
        assert_eq!(end, Ok(()));
    }

    #[test]
    fn a_block_over_continuation_frames_goes_on_as_one_frame() {
        let input = [
            frame(HEADERS, 1, 5, b"\x83\x41\x09/k"),
            frame(CONTINUATION, 0, 5, b""),
            frame(CONTINUATION, END_HEADERS, 5, b"ms.sock\x86"),
        ];
        let (output, end) = run(input.iter().map(Vec::as_slice));
        assert_eq!(output, frame(HEADERS, END_HEADERS | 1, 5, b"\x83\x41\x01k\x86"));
        assert_eq!(end, Ok(()));
    }

    #[test]
    fn other_frames_pass_at_once_and_untouched() {
        let data = frame(0, 1, 1, b"\x41\x02/k");
        assert_eq!(run([&data[..11]]).0, &data[..11]);
        let huge = [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[7; 100]].concat();
        assert_eq!(run([&huge[..]]), (huge.clone(), Ok(())));
        let stray = frame(CONTINUATION, END_HEADERS, 1, b"\x41\x02/k");
        assert_eq!(run([&stray[..]]), (stray.clone(), Ok(())));
    }

    #[test]
    fn a_block_that_does_not_parse_passes_untouched() {
        let broken = frame(HEADERS, END_HEADERS, 1, b"\x41\x09/k");
        assert_eq!(run([&broken[..]]), (broken.clone(), Ok(())));
    }

    #[test]
    fn nothing_may_stand_between_the_frames_of_a_block() {
        let open = frame(HEADERS, 0, 1, b"\x83");
        for other in [
            frame(0, 0, 1, b"x"),
            frame(HEADERS, END_HEADERS, 3, b"\x83"),
            frame(CONTINUATION, END_HEADERS, 3, b"\x83"),
            frame(6, 0, 0, &[0; 8]),
        ] {
            assert_eq!(run([&open[..], &other[..]]), (Vec::new(), Err(FrameError::Interrupted)));
        }
    }

    #[test]
    fn a_block_has_at_most_so_many_bytes_and_frames() {
        let end_with = |count: usize, last: &[u8]| {
            let mut input = frame(HEADERS, 0, 1, &vec![0x83; MAX_BLOCK - 1]);
            for _ in 2..count {
                input.extend(frame(CONTINUATION, 0, 1, b""));
            }
            input.extend(frame(CONTINUATION, END_HEADERS, 1, last));
            run([&input[..]]).1
        };
        assert_eq!(end_with(MAX_BLOCK_FRAMES, b"\x83"), Ok(()));
        assert_eq!(end_with(MAX_BLOCK_FRAMES + 1, b"\x83"), Err(FrameError::TooManyFrames));
        assert_eq!(end_with(MAX_BLOCK_FRAMES, b"\x83\x83"), Err(FrameError::BlockTooLong));
        let long = frame(HEADERS, END_HEADERS, 1, &vec![0x83; MAX_BLOCK + 1]);
        assert_eq!(run([&long[..]]).1, Err(FrameError::BlockTooLong));
    }

    #[test]
    fn a_headers_frame_shorter_than_its_flags_say_closes_the_connection() {
        for (flags, payload) in [
            (PADDED, &b""[..]),
            (PADDED, b"\x02\x83"),
            (PRIORITY, b"\x83"),
            (PADDED | PRIORITY, b"\x01\0\0\0\0\0"),
        ] {
            let malformed = frame(HEADERS, END_HEADERS | flags, 1, payload);
            assert_eq!(run([&malformed[..]]).1, Err(FrameError::Malformed), "{payload:x?}");
        }
    }

    /// Bytes that are frames more often than chance would make them.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let payload =
            proptest::collection::vec(prop_oneof![any::<u8>(), Just(0x41), Just(1), Just(0x83)], 0..40);
        let kind = prop_oneof![4 => Just(HEADERS), 2 => Just(CONTINUATION), 1 => any::<u8>()];
        let flags = prop_oneof![3 => Just(END_HEADERS), 1 => Just(0), 2 => any::<u8>()];
        let one = (kind, flags, 0..2u8, payload).prop_map(|(k, f, s, p)| frame(k, f, s, &p));
        proptest::collection::vec(one, 0..8).prop_map(|frames| frames.concat())
    }

    proptest! {
        #[test]
        fn any_split_of_the_input_gives_the_same_output(input in frames(), size in 1..50usize) {
            prop_assert_eq!(run(input.chunks(size)), run([&input[..]]));
        }

        #[test]
        fn the_output_is_never_longer_and_stays_as_it_is(input in frames()) {
            let (once, _) = run([&input[..]]);
            prop_assert!(once.len() <= input.len());
            prop_assert_eq!(run([&once[..]]), (once, Ok(())));
        }
    }
}
