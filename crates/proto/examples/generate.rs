//! Generates `src/generated` from `proto/`, without `protoc`: `make proto`.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto_dir = crate_dir.join("../../proto");
    let out_dir = crate_dir.join("src/generated");
    std::fs::create_dir_all(&out_dir)?;
    let files = protox::compile(
        ["kubernetes/v1beta1.proto", "kubernetes/v2.proto", "fleet_kms/agent.proto"],
        [&proto_dir],
    )?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".fleet_kms.agent.v1.UnwrapRequest.wrapped")
        .out_dir(&out_dir)
        .compile_fds(files)?;
    Ok(())
}
