//! Free loopback ports, each handed out once per process.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};

static TAKEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A port that is free on 127.0.0.1 for TCP and for UDP and that no other caller in this process was given.
///
/// Another process may still take it before the peer binds it; the peer then fails to start and says so.
///
/// # Errors
/// What the system said when it had no port to give.
pub fn free() -> io::Result<u16> {
    for _ in 0..100 {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let free_for_udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if free_for_udp && taken.get_or_insert_default().insert(port) {
            return Ok(port);
        }
    }
    Err(io::Error::other("a hundred ports in a row were taken"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_handed_out_twice() {
        let ports: Vec<_> = (0..50).map(|_| free().unwrap()).collect();
        assert_eq!(ports.iter().collect::<HashSet<_>>().len(), ports.len());
    }
}
