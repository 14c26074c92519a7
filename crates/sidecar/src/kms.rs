//! Both KMS versions as one service, for one socket.

use std::convert::Infallible;
use std::task::{Context, Poll};

use fleet_kms_proto::v1beta1::key_management_service_server::KeyManagementServiceServer as V1Server;
use fleet_kms_proto::v2::key_management_service_server::KeyManagementServiceServer as V2Server;
use fleet_kms_transport::deadline::{DeadlineLayer, DeadlineService};
use futures_util::future::{BoxFuture, FutureExt, ready};
use hyper::body::Incoming;
use tonic::Status;
use tonic::body::Body;
use tower_layer::Layer;
use tower_service::Service;

use crate::answer::Answers;
use crate::kms_v1::KmsV1;
use crate::kms_v2::KmsV2;
use crate::links::Links;
use crate::node_status::NodeStatus;

/// The most bytes of a request: far above any that could be answered, so that a
/// long plaintext gets its own error.
const MAX_REQUEST: usize = 64 * 1_024;

/// KMS v1 and v2, told apart by the path of a call.
#[derive(Clone)]
pub struct Kms {
    v1: V1Server<KmsV1>,
    v2: V2Server<KmsV2>,
}

impl Kms {
    /// Makes the service, with a deadline for every call.
    pub fn service(links: Links, node_status: NodeStatus, answers: Answers) -> DeadlineService<Self> {
        let v1 = KmsV1::service(links.clone(), answers.clone()).max_decoding_message_size(MAX_REQUEST);
        let v2 = KmsV2::service(links, node_status, answers).max_decoding_message_size(MAX_REQUEST);
        DeadlineLayer.layer(Self { v1, v2 })
    }
}

impl Service<http::Request<Incoming>> for Kms {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        let request = request.map(Body::new);
        match request.uri().path().split('/').nth(1) {
            Some("v1beta1.KeyManagementService") => self.v1.call(request),
            Some("v2.KeyManagementService") => self.v2.call(request),
            _ => ready(Ok(Status::unimplemented("this socket serves KMS v1 and v2").into_http())).boxed(),
        }
    }
}
