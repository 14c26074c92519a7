//! Wrap, Unwrap, Status: who, may they, which keys, do it, say so.

use std::sync::Arc;
use std::time::Instant;

use fleet_kms_keyring::{ClusterId, KeyId};
use fleet_kms_proto::agent::data_plane_server::DataPlane;
use fleet_kms_proto::agent::unwrap_item::Outcome;
use fleet_kms_proto::agent::{
    Refusal, StatusRequest, StatusResponse, UnwrapItem, UnwrapRequest, UnwrapResponse, WrapRequest,
    WrapResponse,
};
use tonic::{Request, Response, Status, async_trait};
use zeroize::Zeroizing;

use crate::answer::{Answers, Call, Said};
use crate::authz::{Permit, actions, internal};
use crate::bulletin::Bulletin;
use crate::grpc_code::{DataError, keys_code};
use crate::ledger::Ledger;
use crate::live_keyrings::{KeysError, LiveKeyrings, Reloaded, UnwrapError, Unwrapped};
use crate::nodes::Nodes;
use crate::rolled_back::RolledBack;
use crate::sightings::Sightings;
use crate::turns::{Turns, Work};

/// Wrapped DEKs in one Unwrap.
pub const MAX_BATCH: usize = 512;
/// A batch takes a turn for so many: what one turn may cost the others.
const ITEMS_PER_TURN: usize = 8;

/// How an item whose key is damaged ends, in the audit.
const KEY_DAMAGED: &str = "damaged";

/// The service of the data port.
#[derive(Clone)]
pub struct DataPlaneService {
    shared: Arc<Shared>,
}

struct Shared {
    answers: Answers,
    keyrings: Arc<LiveKeyrings>,
    ledger: Arc<Ledger>,
    nodes: Arc<Nodes>,
    bulletin: Arc<Bulletin>,
    rolled_back: Arc<RolledBack>,
    sightings: Arc<Sightings>,
    turns: Turns,
    monotonic: fn() -> Instant,
}

impl DataPlaneService {
    /// Makes the service.
    pub fn new(
        answers: Answers,
        keyrings: Arc<LiveKeyrings>,
        ledger: Arc<Ledger>,
        nodes: Arc<Nodes>,
        bulletin: Arc<Bulletin>,
        (rolled_back, sightings): (Arc<RolledBack>, Arc<Sightings>),
        (turns, monotonic): (Turns, fn() -> Instant),
    ) -> Self {
        let shared =
            Shared { answers, keyrings, ledger, nodes, bulletin, rolled_back, sightings, turns, monotonic };
        Self { shared: Arc::new(shared) }
    }
}

#[async_trait]
impl DataPlane for DataPlaneService {
    async fn wrap(&self, request: Request<WrapRequest>) -> Result<Response<WrapResponse>, Status> {
        let shared = &self.shared;
        shared.answers.answer("wrap", request, |call| shared.wrap(call)).await
    }

    async fn unwrap(&self, request: Request<UnwrapRequest>) -> Result<Response<UnwrapResponse>, Status> {
        let shared = &self.shared;
        shared.answers.answer("unwrap", request, |call| shared.unwrap(call)).await
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let shared = &self.shared;
        shared.answers.answer("status", request, |call| shared.status(call)).await
    }
}

impl Shared {
    async fn wrap(
        &self,
        call: Call<actions::Wrap, WrapRequest>,
    ) -> Result<(WrapResponse, Vec<Said>), DataError> {
        let WrapRequest { plaintext, key_id } = call.message;
        let dek = Zeroizing::new(plaintext);
        let named = parse_key_id(&key_id)?;
        let turn = self.turns.turn(call.permit.cluster(), call.permit.who(), Work::Wrap).await;
        let wrapped = self.keyrings.wrap(&call.permit, named.as_ref(), &dek, call.now)?;
        drop(turn);
        let response = WrapResponse {
            wrapped: wrapped.bytes,
            key_id: wrapped.header.key_id.as_bytes().to_vec(),
            version: wrapped.header.version.get(),
        };
        Ok((response, vec![Said::ok(wrapped.header.version)]))
    }

    async fn unwrap(
        &self,
        call: Call<actions::Unwrap, UnwrapRequest>,
    ) -> Result<(UnwrapResponse, Vec<Said>), DataError> {
        let wrapped = call.message.wrapped;
        if !(1..=MAX_BATCH).contains(&wrapped.len()) {
            return Err(DataError::Request { field: "wrapped", problem: "send 1 to 512 wrapped DEKs" });
        }
        let mut items = Vec::with_capacity(wrapped.len());
        let mut said = Vec::with_capacity(wrapped.len());
        let work = if wrapped.len() == 1 { Work::Unwrap } else { Work::Batch };
        for some in wrapped.chunks(ITEMS_PER_TURN) {
            let turn = self.turns.turn(call.permit.cluster(), call.permit.who(), work).await;
            let results: Vec<_> =
                some.iter().map(|wrapped| self.keyrings.unwrap(&call.permit, wrapped)).collect();
            drop(turn);
            for (wrapped, result) in some.iter().zip(results) {
                let (outcome, note) = item(self.looked_up(&call.permit, wrapped, result).await)?;
                items.push(UnwrapItem { outcome: Some(outcome) });
                said.push(note);
            }
        }
        // One damaged key costs what it wrapped, and the call only where that is all of it.
        if said.iter().all(|said| said.outcome == KEY_DAMAGED) {
            return Err(KeysError::Damaged.into());
        }
        Ok((UnwrapResponse { items }, said))
    }

    async fn status(
        &self,
        call: Call<actions::Status, StatusRequest>,
    ) -> Result<(StatusResponse, Vec<Said>), DataError> {
        let active = self.keyrings.active(&call.permit)?;
        self.sightings.in_use(&call.caller);
        self.nodes.report(call.caller.id(), call.message, call.now);
        let response = StatusResponse {
            key_id: active.key_id.as_bytes().to_vec(),
            version: active.version.get(),
            agents: self.bulletin.agents(),
            roots: self.bulletin.roots(),
        };
        Ok((response, vec![Said::ok(active.version)]))
    }

    /// Goes on from the first try to unwrap one: an unknown key id, or one that
    /// opens under Next, makes the agent look into the store again, once. What
    /// still opens under Next was wrapped when this version was active: the
    /// store is an old copy.
    async fn looked_up(
        &self,
        permit: &Permit<actions::Unwrap>,
        wrapped: &[u8],
        result: Result<Unwrapped, UnwrapError>,
    ) -> Result<Unwrapped, UnwrapError> {
        match result {
            Err(UnwrapError::UnknownKey) => {
                // Whoever brought the news: this call, or one that it waited for.
                self.reload(permit.cluster()).await;
                self.keyrings.unwrap(permit, wrapped)
            }
            Ok(unwrapped) if unwrapped.under_next => {
                let again = match self.reload(permit.cluster()).await {
                    true => self.keyrings.unwrap(permit, wrapped)?,
                    false => unwrapped,
                };
                if again.under_next {
                    self.rolled_back.raise(permit.cluster(), again.version);
                }
                Ok(again)
            }
            result => result,
        }
    }

    async fn reload(&self, cluster: ClusterId) -> bool {
        let permit = internal::load(cluster);
        match self.keyrings.refresh(&permit, &self.ledger, (self.monotonic)()).await {
            Ok(reloaded) => reloaded == Reloaded::Newer,
            Err(error) => {
                tracing::warn!(%cluster, %error, "a keyring could not be read again");
                false
            }
        }
    }
}

/// One answer of a batch. Whatever is not ours is refused in one way; only the
/// audit has the reason.
fn item(result: Result<Unwrapped, UnwrapError>) -> Result<(Outcome, Said), DataError> {
    let refused =
        |refusal: Refusal, outcome| Ok((Outcome::Refused(refusal.into()), Said { version: None, outcome }));
    match result {
        Ok(unwrapped) => {
            let outcome = if unwrapped.under_next { "under_next" } else { "ok" };
            let said = Said { version: Some(unwrapped.version), outcome };
            // prost takes the bytes over; what it copies them to is wiped by nobody.
            Ok((Outcome::Plain(unwrapped.dek.to_vec()), said))
        }
        Err(UnwrapError::Malformed) => refused(Refusal::NotOurs, "malformed"),
        Err(UnwrapError::UnknownKey) => refused(Refusal::NotOurs, "unknown_key"),
        Err(UnwrapError::Foreign) => refused(Refusal::NotOurs, "foreign_cluster"),
        Err(UnwrapError::Altered) => refused(Refusal::NotOurs, "altered"),
        Err(UnwrapError::Disabled) => refused(Refusal::VersionDisabled, "version_disabled"),
        Err(UnwrapError::Destroyed) => refused(Refusal::VersionDestroyed, "version_destroyed"),
        Err(UnwrapError::Keys(KeysError::Damaged)) => refused(Refusal::KeyDamaged, KEY_DAMAGED),
        Err(UnwrapError::Keys(keys)) => {
            tracing::debug!(reason = keys_code(keys).1, "an unwrap failed");
            Err(keys.into())
        }
    }
}

fn parse_key_id(bytes: &[u8]) -> Result<Option<KeyId>, DataError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes = bytes
        .try_into()
        .map_err(|_| DataError::Request { field: "key_id", problem: "must be empty or 16 bytes" })?;
    Ok(Some(KeyId::from_bytes(bytes)))
}
