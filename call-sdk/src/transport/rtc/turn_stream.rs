//! TURN over TCP and TLS (RFC 8656 §2.1) for an engine that speaks it over UDP only.
//!
//! A [`TurnStream`] is a UDP port on the loopback interface. What the engine sends there goes over a stream to the
//! server, and the server's messages come back. Messages on a stream carry their own lengths; only channel data has to
//! be padded to four bytes (RFC 8656 §12.5). The engine's own authentication towards the server stays as it is, so
//! another process of this machine that finds the port gains nothing but a connection to the server.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::addresses::AddressRule;

/// Time for one address of the server, with its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A message that the server does not take in this time ends the stream.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Sockets of the engine that one server serves.
const MAX_FLOWS: usize = 8;
/// Messages that wait for the stream. More are lost, as UDP would lose them.
const WAITING: usize = 256;
/// Longest message: a UDP datagram's length.
const MAX_MESSAGE: usize = 65_535;

/// A TURN server that is reached over a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StreamServer {
    host: String,
    port: u16,
    tls: bool,
}

impl StreamServer {
    /// Reads `turn:HOST?transport=tcp` and `turns:HOST` (RFC 7065); `None` for every other URL.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let lower = url.to_ascii_lowercase();
        let (rest, tls) = match (lower.strip_prefix("turns:"), lower.strip_prefix("turn:")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => return None,
        };
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let transport = query.split('&').find_map(|part| part.strip_prefix("transport="));
        // A `turns` URL with UDP means DTLS.
        if transport.map_or(!tls, |transport| transport != "tcp") {
            return None;
        }
        let (host, port) = match place.strip_prefix('[').and_then(|place| place.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':')),
            None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
        };
        let port = match port {
            Some(port) => port.parse().ok()?,
            None if tls => 5349,
            None => 3478,
        };
        (!host.is_empty()).then(|| Self { host: host.to_owned(), port, tls })
    }
}

impl fmt::Display for StreamServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} over {}", self.host, self.port, if self.tls { "TLS" } else { "TCP" })
    }
}

/// A UDP port that leads to a TURN server over streams. Dropping it closes them.
#[derive(Debug)]
pub(super) struct TurnStream {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl TurnStream {
    /// Opens the port. The server is connected to when the first message comes.
    #[allow(clippy::disallowed_methods, reason = "its task ends with the handle")]
    pub(super) async fn open(
        server: StreamServer,
        tls: Arc<ClientConfig>,
        addresses: AddressRule,
    ) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
        let address = socket.local_addr()?;
        let task = tokio::spawn(serve(socket, Arc::new(Way { server, tls, addresses })));
        Ok(Self { address, task })
    }

    /// The URL under which the engine reaches the server.
    pub(super) fn url(&self) -> String {
        format!("turn:{}?transport=udp", self.address)
    }
}

impl Drop for TurnStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How the server is connected to.
struct Way {
    server: StreamServer,
    tls: Arc<ClientConfig>,
    addresses: AddressRule,
}

impl Way {
    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let StreamServer { host, port, tls } = &self.server;
        let mut failed = io::Error::other("it has no address that may be connected to");
        for address in tokio::net::lookup_host((host.as_str(), *port)).await? {
            if !self.addresses.permits(address.ip()) {
                continue;
            }
            let connecting = async {
                let stream = TcpStream::connect(address).await?;
                // Media must not wait for more of it.
                stream.set_nodelay(true)?;
                if !tls {
                    return Ok::<Box<dyn Stream>, io::Error>(Box::new(stream));
                }
                let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                Ok(Box::new(TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await?))
            };
            match timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = error,
                Err(elapsed) => failed = elapsed.into(),
            }
        }
        Err(failed)
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// One stream for each socket of the engine, as an allocation belongs to one pair of addresses (RFC 8656 §2.2).
async fn serve(socket: Arc<UdpSocket>, way: Arc<Way>) {
    let mut flows: BTreeMap<SocketAddr, mpsc::Sender<Vec<u8>>> = BTreeMap::new();
    let mut running = JoinSet::new();
    let mut message = vec![0; MAX_MESSAGE];
    loop {
        tokio::select! {
            received = socket.recv_from(&mut message) => {
                // An error is that of an earlier message to a socket that is closed by now.
                let Ok((length, from)) = received else { continue };
                if !flows.contains_key(&from) && flows.len() == MAX_FLOWS {
                    continue;
                }
                let flow = flows.entry(from).or_insert_with(|| {
                    let (sender, receiver) = mpsc::channel(WAITING);
                    let (way, socket) = (Arc::clone(&way), Arc::clone(&socket));
                    running.spawn(async move { (from, carry(&way, &socket, from, receiver).await) });
                    sender
                });
                let _ = flow.try_send(message[..length].to_vec());
            }
            Some(ended) = running.join_next() => {
                if let Ok((from, result)) = ended {
                    flows.remove(&from);
                    if let Err(error) = result {
                        tracing::info!(server = %way.server, %error, "a connection to a TURN server ended");
                    }
                }
            }
        }
    }
}

/// Carries the messages of one socket of the engine, until the stream ends.
async fn carry(
    way: &Way,
    socket: &UdpSocket,
    engine: SocketAddr,
    mut messages: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(way.connect().await?);
    let up = async {
        while let Some(mut message) = messages.recv().await {
            let Some(Frame { plain, framed }) = Frame::of(&message) else { continue };
            if plain > message.len() {
                continue;
            }
            message.resize(framed, 0);
            timeout(WRITE_TIMEOUT, writer.write_all(&message)).await??;
            timeout(WRITE_TIMEOUT, writer.flush()).await??;
        }
        Ok(())
    };
    let down = async {
        let mut buffer = vec![0; 4];
        loop {
            buffer.resize(4, 0);
            reader.read_exact(&mut buffer).await?;
            let Some(Frame { plain, framed }) = Frame::of(&buffer) else {
                return Err(io::Error::other("it does not speak TURN"));
            };
            buffer.resize(framed, 0);
            reader.read_exact(&mut buffer[4..]).await?;
            let _ = socket.send_to(&buffer[..plain], engine).await;
        }
    };
    tokio::select! { result = up => result, result = down => result }
}

/// The lengths of a message, in bytes: without padding, and on a stream.
#[derive(Debug, PartialEq)]
struct Frame {
    plain: usize,
    framed: usize,
}

impl Frame {
    /// Reads the first four bytes of a STUN message (RFC 8489 §5) or of channel data (RFC 8656 §12.4).
    fn of(message: &[u8]) -> Option<Self> {
        let [first, _, high, low, ..] = *message else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        match first >> 6 {
            0 if length.is_multiple_of(4) => Some(Self { plain: 20 + length, framed: 20 + length }),
            1 => Some(Self { plain: 4 + length, framed: 4 + length.next_multiple_of(4) }),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "the servers of the tests are tasks")]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::tls;

    #[test]
    fn urls_of_rfc_7065_are_read() {
        let server = |host: &str, port, tls| Some(StreamServer { host: host.to_owned(), port, tls });
        for (url, wanted) in [
            ("turn:turn.example.org?transport=tcp", server("turn.example.org", 3478, false)),
            ("turn:turn.example.org:80?transport=TCP", server("turn.example.org", 80, false)),
            ("turns:turn.example.org", server("turn.example.org", 5349, true)),
            ("turns:[2001:db8::1]:443?transport=tcp", server("2001:db8::1", 443, true)),
            ("turn:turn.example.org", None),
            ("turn:turn.example.org?transport=udp", None),
            ("turns:turn.example.org?transport=udp", None),
            ("turns:turn.example.org:99999", None),
            ("turns:", None),
            ("stun:turn.example.org", None),
        ] {
            assert_eq!(StreamServer::parse(url), wanted, "{url}");
        }
    }

    #[test]
    fn lengths_are_read_from_the_first_four_bytes() {
        assert_eq!(Frame::of(&[0, 3, 0, 8]), Some(Frame { plain: 28, framed: 28 }));
        assert_eq!(Frame::of(&[0x40, 0, 0, 5, 1]), Some(Frame { plain: 9, framed: 12 }));
        assert_eq!(Frame::of(&[0x40, 0, 0, 0]), Some(Frame { plain: 4, framed: 4 }));
        for bad in [&[0, 3, 0, 7][..], &[0x80, 0, 0, 0], &[0, 1, 0]] {
            assert_eq!(Frame::of(bad), None, "{bad:?}");
        }
    }

    /// A server that sends everything back, with a certificate of its own authority.
    async fn echo() -> (StreamServer, Arc<ClientConfig>) {
        let (roots, server) = tls::testing::authority();
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        let options = tls::TlsOptions { system_roots: false, extra_roots: vec![roots] };
        let server = StreamServer { host: "localhost".to_owned(), port, tls: true };
        (server, tls::client_config(&options).unwrap())
    }

    #[tokio::test]
    async fn messages_keep_their_borders_over_tls() {
        let (server, tls) = echo().await;
        let stream = TurnStream::open(server, tls, AddressRule::Any).await.unwrap();
        let engine = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let binding = [&[0, 1, 0, 4][..], &[7; 20]].concat();
        let channel = [&[0x40, 0, 0, 5][..], &[9; 5]].concat();
        // Neither TURN nor whole: it must not reach the stream.
        let garbage = [vec![0xff; 30], [&[0x40, 0, 1, 0][..], &[9; 5]].concat()];
        for message in garbage.iter().chain([&binding, &channel, &binding]) {
            engine.send_to(message, stream.address).await.unwrap();
        }
        for wanted in [&binding, &channel, &binding] {
            let mut buffer = [0; 100];
            let length = timeout(Duration::from_secs(10), engine.recv(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(buffer[..length], wanted[..]);
        }
    }

    #[tokio::test]
    async fn private_addresses_are_refused_under_public_only() {
        let (server, tls) = echo().await;
        let way = Way { server, tls, addresses: AddressRule::PublicOnly };
        let Err(error) = way.connect().await else { panic!("connected") };
        assert!(error.to_string().contains("no address"), "{error}");
    }
}
