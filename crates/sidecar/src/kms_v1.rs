//! KMS v1, as kube-apiserver speaks it since 1.10.

use fleet_kms_proto::v1beta1::key_management_service_server::{
    KeyManagementService, KeyManagementServiceServer,
};
use fleet_kms_proto::v1beta1::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, VersionRequest, VersionResponse,
};
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::agent_calls;
use crate::answer::Answers;
use crate::grpc_code::CallError;
use crate::links::Links;
use crate::metrics::Operation;

/// The one version that kube-apiserver accepts.
const VERSION: &str = "v1beta1";

/// The most that an agent wraps. kube-apiserver sends 32 bytes, and 4 to probe.
pub const MAX_PLAINTEXT: usize = 1_024;

/// The v1 handlers.
#[derive(Clone)]
pub struct KmsV1 {
    links: Links,
    answers: Answers,
}

impl KmsV1 {
    /// Makes the gRPC service of the v1 handlers.
    pub fn service(links: Links, answers: Answers) -> KeyManagementServiceServer<Self> {
        KeyManagementServiceServer::new(Self { links, answers })
    }
}

#[tonic::async_trait]
impl KeyManagementService for KmsV1 {
    /// Needs no agent: kube-apiserver asks this first, within its first call's
    /// deadline.
    async fn version(&self, request: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        self.answers
            .answer(Operation::V1Version, request, |_| async {
                Ok(VersionResponse {
                    version: VERSION.to_owned(),
                    runtime_name: "fleet-kms".to_owned(),
                    runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
                })
            })
            .await
    }

    async fn encrypt(&self, request: Request<EncryptRequest>) -> Result<Response<EncryptResponse>, Status> {
        self.answers
            .answer(Operation::V1Encrypt, request, |call| async move {
                let plaintext = Zeroizing::new(call.message.plain);
                match plaintext.len() {
                    0 => return Err(CallError::EmptyPlaintext),
                    1..=MAX_PLAINTEXT => {}
                    _ => return Err(CallError::LongPlaintext { limit: MAX_PLAINTEXT }),
                }
                let wrapped = agent_calls::wrap(&self.links, &plaintext, None, call.deadline).await?;
                Ok(EncryptResponse { cipher: wrapped.bytes })
            })
            .await
    }

    async fn decrypt(&self, request: Request<DecryptRequest>) -> Result<Response<DecryptResponse>, Status> {
        self.answers
            .answer(Operation::V1Decrypt, request, |call| async move {
                let plain = agent_calls::unwrap(&self.links, call.message.cipher, call.deadline).await?;
                Ok(DecryptResponse { plain })
            })
            .await
    }
}
