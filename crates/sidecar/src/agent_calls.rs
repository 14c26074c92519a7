//! What the handlers ask of an agent, and the checks that its answers must pass
//! before kube-apiserver stores them for years.
//!
//! Read-ahead will live here: [`unwrap`] is the one place that asks for DEKs.

use bytes::Bytes;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{Refusal, StatusRequest, StatusResponse, UnwrapRequest, WrapRequest};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::grpc_code::CallError;
use crate::links::{Links, LinksError, attempt_request};
use crate::wrapped_header::{KeyId, WrappedHeader};

/// A DEK that an agent has wrapped.
#[derive(Debug)]
pub struct Wrapped {
    /// What kube-apiserver stores.
    pub bytes: Vec<u8>,
    /// Which version did it.
    pub header: WrappedHeader,
}

/// Has a DEK wrapped: under the named version, or under the active one.
pub async fn wrap(
    links: &Links,
    plaintext: &Zeroizing<Vec<u8>>,
    key_id: Option<KeyId>,
    deadline: Instant,
) -> Result<Wrapped, CallError> {
    let named = key_id.map_or_else(Vec::new, |key_id| key_id.as_bytes().to_vec());
    let answer = links
        .call(deadline, |mut client, time| {
            let request = WrapRequest { plaintext: plaintext.to_vec(), key_id: named.clone() };
            async move { client.wrap(attempt_request(request, time)).await }
        })
        .await
        .map_err(wrap_error)?;
    let header = WrappedHeader::read(&answer.wrapped).ok_or(CallError::BadAnswer("no wrapped DEK"))?;
    if answer.key_id != header.key_id.as_bytes() || answer.version != header.version {
        return Err(CallError::BadAnswer("another key id than the wrapped DEK's"));
    }
    if key_id.is_some_and(|named| named != header.key_id) {
        return Err(CallError::BadAnswer("another key id than the one that was named"));
    }
    Ok(Wrapped { bytes: answer.wrapped, header })
}

/// Has a DEK unwrapped.
pub async fn unwrap(links: &Links, wrapped: Vec<u8>, deadline: Instant) -> Result<Vec<u8>, CallError> {
    let wrapped = Bytes::from(wrapped);
    let answer = links
        .call(deadline, |mut client, time| {
            let request = UnwrapRequest { wrapped: vec![wrapped.clone()] };
            async move { client.unwrap(attempt_request(request, time)).await }
        })
        .await?;
    let [item] = <[_; 1]>::try_from(answer.items).map_err(|_| CallError::BadAnswer("not one item"))?;
    match item.outcome {
        Some(Outcome::Plain(plain)) if !plain.is_empty() => Ok(plain),
        Some(Outcome::Plain(_)) => Err(CallError::BadAnswer("an empty DEK")),
        Some(Outcome::Refused(refused)) => match Refusal::try_from(refused) {
            Ok(Refusal::NotOurs) => Err(CallError::NotOurs),
            Ok(Refusal::VersionDisabled) => Err(CallError::VersionDisabled),
            Ok(Refusal::VersionDestroyed) => Err(CallError::VersionDestroyed),
            // One item that is refused so fails as a whole call, which another agent may answer.
            Ok(Refusal::KeyDamaged | Refusal::Unspecified) | Err(_) => {
                Err(CallError::BadAnswer("an unknown refusal"))
            }
        },
        None => Err(CallError::BadAnswer("an item without outcome")),
    }
}

/// Reports this node's state and asks for the active version and the fleet's.
pub async fn status(
    links: &Links,
    request: &StatusRequest,
    deadline: Instant,
) -> Result<StatusResponse, CallError> {
    let answer = links
        .call(deadline, |mut client, time| {
            let request = request.clone();
            async move { client.status(attempt_request(request, time)).await }
        })
        .await?;
    Ok(answer)
}

/// Tells what an agent says about a version apart from what it says about this
/// node.
fn wrap_error(error: LinksError) -> CallError {
    let LinksError::Refused(refusal) = &error else { return error.into() };
    match refusal.reason.as_str() {
        "key_id_not_ours" | "key_id_not_yet_active" | "key_id_retired" => CallError::KeyRotated,
        "version_disabled" => CallError::VersionDisabled,
        "version_destroyed" => CallError::VersionDestroyed,
        _ => error.into(),
    }
}
