//! The engine's runtime, with sockets that leave out repeated handshake messages.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use webrtc::runtime::{
    AsyncInterval, AsyncTcpListener, AsyncTcpStream, AsyncUdpSocket, JoinHandle, RecvMeta, Runtime,
    TokioRuntime, Transmit,
};

use super::repeats::Repeats;

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Tokio, for one peer connection.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    repeats: Arc<Mutex<Repeats>>,
}

impl Runtime for Sockets {
    fn spawn(&self, future: Boxed<'static, ()>) -> Box<dyn JoinHandle> {
        TokioRuntime.spawn(future)
    }

    fn spawn_reactor(&self, pool_size: usize, future: Boxed<'static, ()>) -> Box<dyn JoinHandle> {
        TokioRuntime.spawn_reactor(pool_size, future)
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        Ok(Arc::new(Socket { inner, repeats: Arc::clone(&self.repeats) }))
    }

    fn wrap_tcp_listener(&self, listener: std::net::TcpListener) -> io::Result<Arc<dyn AsyncTcpListener>> {
        TokioRuntime.wrap_tcp_listener(listener)
    }

    fn connect_tcp<'a>(&'a self, remote: SocketAddr) -> Boxed<'a, io::Result<Arc<dyn AsyncTcpStream>>> {
        TokioRuntime.connect_tcp(remote)
    }

    fn resolve_host<'a>(&'a self, host: &'a str) -> Boxed<'a, io::Result<Vec<SocketAddr>>> {
        TokioRuntime.resolve_host(host)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }

    fn sleep(&self, duration: Duration) -> Boxed<'static, ()> {
        TokioRuntime.sleep(duration)
    }

    fn interval(&self, period: Duration) -> Box<dyn AsyncInterval> {
        TokioRuntime.interval(period)
    }

    fn block_on(&self, future: Pin<Box<dyn Future<Output = ()> + '_>>) {
        TokioRuntime.block_on(future);
    }

    fn yield_now(&self) -> Boxed<'static, ()> {
        TokioRuntime.yield_now()
    }

    fn name(&self) -> &'static str {
        TokioRuntime.name()
    }
}

#[derive(Debug)]
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
    repeats: Arc<Mutex<Repeats>>,
}

impl AsyncUdpSocket for Socket {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_gso_segments(&self) -> usize {
        self.inner.max_gso_segments()
    }

    fn max_gro_segments(&self) -> usize {
        self.inner.max_gro_segments()
    }

    fn poll_send(&self, cx: &mut Context<'_>, transmit: &Transmit<'_>) -> Poll<io::Result<usize>> {
        self.inner.poll_send(cx, transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let received = ready!(self.inner.poll_recv(cx, buffers, meta))?;
            let mut left = received == 0;
            let mut repeats = self.repeats.lock().unwrap_or_else(PoisonError::into_inner);
            for (buffer, meta) in buffers.iter_mut().zip(meta.iter_mut()).take(received) {
                let from = meta.addr;
                meta.len =
                    leave_out(buffer, meta.len, meta.stride, |datagram| repeats.is_repeat(from, datagram));
                left |= meta.len > 0;
            }
            drop(repeats);
            if left {
                return Poll::Ready(Ok(received));
            }
        }
    }
}

/// Leaves the datagrams out that `unwanted` names, of those of `stride` bytes each that fill the first `length` bytes of
/// the buffer; the last may be shorter. Returns the new length.
fn leave_out(
    buffer: &mut [u8],
    length: usize,
    stride: usize,
    mut unwanted: impl FnMut(&[u8]) -> bool,
) -> usize {
    let length = length.min(buffer.len());
    let (mut kept, mut begin) = (0, 0);
    while begin < length {
        let end = begin.saturating_add(stride.max(1)).min(length);
        if !buffer.get(begin..end).is_some_and(&mut unwanted) {
            if kept < begin {
                buffer.copy_within(begin..end, kept);
            }
            kept += end - begin;
        }
        begin = end;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unwanted_datagrams_are_left_out() {
        let left = |stride, unwanted: &[&[u8]]| {
            let mut buffer = *b"aabbccd--";
            let length = leave_out(&mut buffer, 7, stride, |datagram| unwanted.contains(&datagram));
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(left(2, &[]), "aabbccd");
        assert_eq!(left(2, &[b"aa"]), "bbccd");
        assert_eq!(left(2, &[b"bb", b"d"]), "aacc");
        assert_eq!(left(7, &[b"aabbccd"]), "");
        assert_eq!(left(0, &[b"a"]), "bbccd");
    }
}
