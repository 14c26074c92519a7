//! kube-apiserver's own clients against kms-sidecar, at the versions that send each form of `:authority`.

use std::os::unix::net::UnixListener;

use fleet_kms_tests::kms_client::{Api, KmsClient};
use fleet_kms_tests::peers::ClientVersion;

/// Says that the client itself keeps its promise, so that a test of the sidecar's deadline means the sidecar.
#[test]
fn a_client_lets_go_of_a_silent_server_at_its_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent.sock");
    let _silent = UnixListener::bind(&socket).unwrap();
    for version in ClientVersion::ALL {
        for api in Api::ALL {
            let client = KmsClient::new(version, api, &socket).unwrap();
            let result = client.call(&["timeout", "-timeout", "300ms"]).unwrap().last().unwrap();
            assert!(result["elapsed_ms"].as_i64().unwrap() >= 300, "{version:?} {api:?}: {result}");
        }
    }
}
