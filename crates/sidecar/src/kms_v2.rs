//! KMS v2.
//!
//! kube-apiserver throws an Encrypt answer away whose key id is not the one of
//! the Status answer before it. So Encrypt asks for the version that this
//! process's last Status answer named, even while the fleet rotates.

use fleet_kms_proto::v2::key_management_service_server::{KeyManagementService, KeyManagementServiceServer};
use fleet_kms_proto::v2::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::agent_calls;
use crate::answer::Answers;
use crate::grpc_code::CallError;
use crate::links::Links;
use crate::metrics::Operation;
use crate::node_status::NodeStatus;
use crate::wrapped_header::WrappedHeader;

/// The most that fits: kube-apiserver takes 1,024 bytes of ciphertext, and a
/// wrapped DEK is 61 bytes longer than the DEK.
pub const MAX_PLAINTEXT: usize = 963;

/// The v2 handlers.
#[derive(Clone)]
pub struct KmsV2 {
    links: Links,
    node_status: NodeStatus,
    answers: Answers,
}

impl KmsV2 {
    /// Makes the gRPC service of the v2 handlers.
    pub fn service(
        links: Links,
        node_status: NodeStatus,
        answers: Answers,
    ) -> KeyManagementServiceServer<Self> {
        KeyManagementServiceServer::new(Self { links, node_status, answers })
    }
}

#[tonic::async_trait]
impl KeyManagementService for KmsV2 {
    /// Fails rather than tell bad health in its text: with a valid key id the
    /// API server would go on writing under its old seed.
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.answers
            .answer(Operation::V2Status, request, |call| async move {
                let active = self.node_status.ask(call.deadline).await?;
                let named = self.node_status.name(active);
                Ok(StatusResponse {
                    version: "v2".to_owned(),
                    healthz: "ok".to_owned(),
                    key_id: named.key_id.to_string(),
                })
            })
            .await
    }

    async fn encrypt(&self, request: Request<EncryptRequest>) -> Result<Response<EncryptResponse>, Status> {
        self.answers
            .answer(Operation::V2Encrypt, request, |call| async move {
                let plaintext = Zeroizing::new(call.message.plaintext);
                match plaintext.len() {
                    0 => return Err(CallError::EmptyPlaintext),
                    1..=MAX_PLAINTEXT => {}
                    _ => return Err(CallError::LongPlaintext { limit: MAX_PLAINTEXT }),
                }
                let named = self.node_status.named().map(|named| named.key_id);
                let wrapped = agent_calls::wrap(&self.links, &plaintext, named, call.deadline).await?;
                Ok(EncryptResponse {
                    ciphertext: wrapped.bytes,
                    key_id: wrapped.header.key_id.to_string(),
                    annotations: Default::default(),
                })
            })
            .await
    }

    async fn decrypt(&self, request: Request<DecryptRequest>) -> Result<Response<DecryptResponse>, Status> {
        self.answers
            .answer(Operation::V2Decrypt, request, |call| async move {
                let wrapped = call.message.ciphertext;
                let header = WrappedHeader::read(&wrapped);
                if header.is_some_and(|header| call.message.key_id != header.key_id.to_string()) {
                    return Err(CallError::NotOurs);
                }
                // What has no readable header goes too: the agent refuses it, and its audit says why.
                let plaintext = agent_calls::unwrap(&self.links, wrapped, call.deadline).await?;
                header.map(|_| DecryptResponse { plaintext }).ok_or(CallError::NotOurs)
            })
            .await
    }
}
