//! The other end of the local socket: a command on the agent's host.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use zeroize::Zeroizing;

use super::protocol::{Answer, Reply, Request, Secret, encode};

/// Why the running agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket broke.
    #[error("the agent's socket {path} cannot be used")]
    Socket {
        path: String,
        #[source]
        source: io::Error,
    },
    /// The agent refused.
    #[error("{0}")]
    Refused(String),
}

/// Asks the agent that runs on this host; `None` when none does.
///
/// # Errors
///
/// When the agent refuses, or goes away meanwhile.
pub fn ask(path: &Path, request: &Request, secrets: &[Secret]) -> Result<Option<Reply>, ClientError> {
    let failed = |source| ClientError::Socket { path: path.display().to_string(), source };
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        // What a crash left behind is nobody's socket.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let answer = talk(stream, request, secrets).map_err(failed)?;
    match answer {
        Answer::Ok(reply) => Ok(Some(*reply)),
        Answer::Error(text) => Err(ClientError::Refused(text)),
    }
}

fn talk(mut stream: UnixStream, request: &Request, secrets: &[Secret]) -> io::Result<Answer> {
    stream.write_all(&encode(request, secrets)?)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Zeroizing::new(Vec::new());
    stream.read_to_end(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the agent said nothing"));
    }
    Ok(serde_json::from_slice(&answer)?)
}
