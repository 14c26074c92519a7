//! Rotations while a client wraps and unwraps through the sidecar: no call may fail, and the slowest percent of calls
//! is compared with the same run without rotations.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fleet_kms_process::clock;
use fleet_kms_proto::v1beta1::key_management_service_client::KeyManagementServiceClient;
use fleet_kms_proto::v1beta1::{DecryptRequest, EncryptRequest};
use fleet_kms_tests::fleet::Fleet;
use fleet_kms_tests::wait::timed;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tonic::body::Body;

/// Calls per second of all callers together, half of them wraps.
const CALLS_PER_SECOND: u32 = 2_000;
const CALLERS: u32 = 16;
const ROTATIONS: usize = 100;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(100);

/// How the calls of one run went.
#[derive(Default)]
struct Run {
    errors: Vec<String>,
    took: Vec<Duration>,
}

impl Run {
    fn quantile(&mut self, q: f64) -> Duration {
        self.took.sort_unstable();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let index = ((self.took.len() - 1) as f64 * q) as usize;
        self.took[index]
    }
}

type Client = KeyManagementServiceClient<
    tower::util::BoxCloneSyncService<
        http::Request<Body>,
        http::Response<hyper::body::Incoming>,
        hyper::Error,
    >,
>;

async fn client(socket: &Path) -> Client {
    let stream = TokioIo::new(tokio::net::UnixStream::connect(socket).await.unwrap());
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let origin = http::Uri::from_static("http://localhost");
    KeyManagementServiceClient::with_origin(tower::util::BoxCloneSyncService::new(service), origin)
}

/// One caller: wraps a DEK and unwraps an earlier one, in turn, at its share of the rate.
async fn call(socket: PathBuf, number: u32, stop: Arc<AtomicBool>) -> Run {
    let (mut client, mut run) = (client(&socket).await, Run::default());
    let mut ticks = tokio::time::interval(Duration::from_secs(1) * CALLERS / CALLS_PER_SECOND);
    let mut wrapped: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        let started: Instant = clock::monotonic();
        let calls = run.took.len();
        if calls % 2 == 0 {
            let plain = vec![u8::try_from(calls % 251).unwrap() ^ u8::try_from(number).unwrap(); 32];
            let request = EncryptRequest { version: "v1beta1".to_owned(), plain: plain.clone() };
            match client.encrypt(request).await {
                Ok(response) => wrapped.push((plain, response.into_inner().cipher)),
                Err(status) => run.errors.push(status.to_string()),
            }
        } else {
            // Old ones too: they were wrapped under versions that have been rotated away since.
            let (plain, cipher) = wrapped[calls * 7_919 % wrapped.len()].clone();
            match client.decrypt(DecryptRequest { version: "v1beta1".to_owned(), cipher }).await {
                Ok(response) => assert_eq!(response.into_inner().plain, plain),
                Err(status) => run.errors.push(status.to_string()),
            }
        }
        run.took.push(started.elapsed());
    }
    run
}

/// Calls for as long as `meanwhile` takes.
fn run_while(socket: &Path, meanwhile: impl FnOnce() + Send) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let stopping = Arc::clone(&stop);
        scope.spawn(move || {
            meanwhile();
            stopping.store(true, Ordering::Relaxed);
        });
        runtime.block_on(async {
            let callers: Vec<_> = (0..CALLERS)
                .map(|number| tokio::spawn(call(socket.to_owned(), number, Arc::clone(&stop))))
                .collect();
            let mut total = Run::default();
            for caller in callers {
                let run = caller.await.unwrap();
                total.errors.extend(run.errors);
                total.took.extend(run.took);
            }
            total
        })
    })
}

/// Runs kmsctl again and again, as the other run does: starting a program costs more than a rotation.
fn again_and_again(fleet: &Fleet, args: &[&str]) {
    for _ in 0..ROTATIONS {
        fleet.kmsctl(args).unwrap();
        std::thread::sleep(PAUSE);
    }
}

#[test]
fn a_hundred_rotations_fail_no_call() {
    let fleet = Fleet::start().unwrap();
    let cluster = fleet.cluster("edge-1").unwrap();
    let sidecar = fleet.sidecar(&cluster, "node-1").unwrap();
    let show = ["key", "show", &cluster.name];
    let rotate = ["key", "rotate", &cluster.name, "--yes"];
    let (mut without, looking) = timed(|| run_while(&sidecar.socket, || again_and_again(&fleet, &show)));
    let (mut with, rotating) = timed(|| run_while(&sidecar.socket, || again_and_again(&fleet, &rotate)));
    for (name, run, took) in [("with 100 rotations", &mut with, rotating), ("without", &mut without, looking)]
    {
        let rate = run.took.len() as f64 / took.as_secs_f64();
        println!(
            "{name}: {} calls, {rate:.0}/s, {} errors, p50 {:?}, p99 {:?}",
            run.took.len(),
            run.errors.len(),
            run.quantile(0.5),
            run.quantile(0.99),
        );
    }
    let shown = fleet.kmsctl_json(&["key", "versions", &cluster.name]).unwrap();
    assert!(shown.to_string().contains(&format!("\"version\":{}", ROTATIONS + 2)), "{shown}");
    assert_eq!((with.errors, without.errors), (Vec::new(), Vec::new()));
}
