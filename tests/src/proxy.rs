//! A TCP proxy that cuts connections off in the middle.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// After how many bytes each way a connection is cut off.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// From the client.
    pub request: u64,
    /// To the client.
    pub reply: u64,
}

impl Cut {
    /// Lets a connection be.
    pub fn never() -> Self {
        Self { request: u64::MAX, reply: u64::MAX }
    }
}

type Plan = Arc<Mutex<fn() -> Cut>>;

/// A proxy before a port of 127.0.0.1, for the life of the process.
pub struct Proxy {
    port: u16,
    plan: Plan,
}

impl Proxy {
    /// Starts to pass connections on.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(to: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let plan: Plan = Arc::new(Mutex::new(Cut::never));
        let planned = Arc::clone(&plan);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let cut = (planned.lock().unwrap_or_else(PoisonError::into_inner))();
                // A target that is not there looks as it does without a proxy: the client's connection ends.
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                pass_on(&client, &server, cut.request);
                pass_on(&server, &client, cut.reply);
            }
        });
        Ok(Self { port, plan })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Asks `plan` for each connection from now on.
    pub fn cut(&self, plan: fn() -> Cut) {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = plan;
    }
}

/// Copies from one end to the other until either closes, or `limit` bytes are through.
fn pass_on(from: &TcpStream, to: &TcpStream, limit: u64) {
    let (Ok(from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
    thread::spawn(move || {
        let (mut buffer, mut left) = ([0; 2_048], limit);
        while left > 0 {
            let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let Some(some) = buffer.get_mut(..room) else { break };
            match (&from).read(some) {
                Ok(read @ 1..) => {
                    let Some(some) = some.get(..read) else { break };
                    left -= read as u64;
                    if to.write_all(some).is_err() {
                        break;
                    }
                }
                _ => break,
            }
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    });
}
