//! The `:authority` rewrite against `h2`'s own server as the oracle.
//!
//! This shows that `h2` reads what the client meant. That kube-apiserver gets
//! its answers only a real one can show.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code; clippy knows #[test] functions only"
)]

#[path = "authority/client.rs"]
mod client;

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use fleet_kms_sidecar::authority::{AuthorityRewrite, Framer};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::client::{Client, Expected, requests};

/// A connection whose client has sent some bytes in pieces and then waits.
struct Sent<'a> {
    bytes: &'a [u8],
    /// The most that one read gets.
    size: usize,
}

impl AsyncRead for Sent<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.bytes.len().min(self.size).min(buf.remaining());
        let (piece, rest) = self.bytes.split_at(length);
        self.bytes = rest;
        if piece.is_empty() {
            return Poll::Pending;
        }
        buf.put_slice(piece);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Sent<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What `h2`'s server makes of the bytes.
fn accepted(io: impl AsyncRead + AsyncWrite + Unpin) -> Vec<Expected> {
    let mut cx = Context::from_waker(Waker::noop());
    let mut handshake = pin!(h2::server::handshake(io));
    let Poll::Ready(connection) = handshake.as_mut().poll(&mut cx) else { panic!("no handshake") };
    let mut connection = connection.unwrap();
    let mut all = Vec::new();
    while let Poll::Ready(Some(next)) = connection.poll_accept(&mut cx) {
        let (request, _respond) = next.expect("the connection lives on");
        let mut fields: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        fields.sort();
        let authority = request.uri().authority().map(ToString::to_string);
        all.push(Expected::Request { authority, fields });
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn h2_reads_every_list_as_it_was_but_for_the_authority(requests in requests(), size in 1..8_000usize) {
        let (mut client, mut bytes) = Client::new();
        let mut expected: Vec<_> = requests.iter().map(|request| client.send(request, &mut bytes)).collect();
        expected.retain(|one| *one != Expected::Reset);
        prop_assert_eq!(accepted(AuthorityRewrite::new(Sent { bytes: &bytes, size })), expected);
    }

    #[test]
    fn any_split_gives_the_same_output_and_a_second_rewrite_the_same_again(
        requests in requests(), size in 1..600usize
    ) {
        let (mut client, mut bytes) = Client::new();
        for request in &requests {
            client.send(request, &mut bytes);
        }
        let run = |input: &[u8], size: usize| {
            let (mut framer, mut output) = (Framer::new(), Vec::new());
            input.chunks(size).try_for_each(|piece| framer.push(piece, &mut output)).map(|()| output)
        };
        let whole = run(&bytes, bytes.len()).unwrap();
        prop_assert!(whole.len() <= bytes.len());
        prop_assert_eq!(run(&bytes, size).unwrap(), whole.clone());
        prop_assert_eq!(run(&whole, size).unwrap(), whole);
    }
}

#[test]
fn without_the_rewrite_h2_resets_a_path_so_the_oracle_can_fail() {
    let (_, mut bytes) = Client::new();
    bytes.extend_from_slice(b"\x00\x00\x0e\x01\x05\x00\x00\x00\x01\x83\x86\x84\x41\x09/kms.sock");
    assert_eq!(accepted(Sent { bytes: &bytes, size: 7 }), []);
    let expected = Expected::Request { authority: Some("k".to_owned()), fields: Vec::new() };
    assert_eq!(accepted(AuthorityRewrite::new(Sent { bytes: &bytes, size: 7 })), [expected]);
}

#[test]
fn after_a_reset_stream_the_next_one_still_decodes_right() {
    let (_, mut bytes) = Client::new();
    // The path by its static name, then by that entry's name (62), then the older entry (63) as it is.
    bytes.extend_from_slice(b"\x00\x00\x0e\x01\x05\x00\x00\x00\x01\x83\x86\x84\x41\x09/kms.sock");
    bytes.extend_from_slice(b"\x00\x00\x08\x01\x05\x00\x00\x00\x03\x83\x86\x84\x7e\x03/a/");
    bytes.extend_from_slice(b"\x00\x00\x04\x01\x05\x00\x00\x00\x05\x83\x86\x84\xbf");
    let expected = || Expected::Request { authority: Some("k".to_owned()), fields: Vec::new() };
    assert_eq!(
        accepted(AuthorityRewrite::new(Sent { bytes: &bytes, size: 4_096 })),
        [expected(), expected()]
    );
}

#[test]
fn the_fuzz_corpus_gives_the_same_output_for_any_split() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/authority");
    let mut files = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let run = |size: usize| {
            let (mut framer, mut output) = (Framer::new(), Vec::new());
            let end = bytes.chunks(size).try_for_each(|piece| framer.push(piece, &mut output));
            (output, end)
        };
        let whole = run(bytes.len());
        assert!(whole.0.len() <= bytes.len());
        assert!((1..40).all(|size| run(size) == whole));
        files += 1;
    }
    assert!(files >= 10, "the corpus is in git");
}
