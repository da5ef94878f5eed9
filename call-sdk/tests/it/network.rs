//! A bad network in user space: a UDP relay that loses, delays and reorders, and a TCP relay that can be cut.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::{AbortHandle, JoinSet},
};

/// What happens to each datagram, in either direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Impairment {
    /// How many of a hundred are lost.
    pub(crate) loss_percent: u32,
    /// Each is delayed by up to this, at random, so that they overtake each other.
    pub(crate) jitter: Duration,
}

/// Stands before a server's UDP port. Every client has a socket of its own towards the server, so that the server tells
/// them apart by their addresses. Ends when dropped.
pub(crate) struct UdpRelay {
    address: SocketAddr,
    state: Arc<State>,
    accepting: AbortHandle,
}

struct State {
    impairment: Impairment,
    random: Mutex<StdRng>,
    dark: Mutex<HashSet<IpAddr>>,
}

impl State {
    /// How long a datagram from or to `client` travels; `None` if it is lost.
    fn fate(&self, client: IpAddr) -> Option<Duration> {
        if self.dark.lock().unwrap().contains(&client) {
            return None;
        }
        let mut random = self.random.lock().unwrap();
        let lost = random.random_range(0..100) < self.impairment.loss_percent;
        (!lost).then(|| self.impairment.jitter.mul_f64(random.random()))
    }
}

impl UdpRelay {
    pub(crate) async fn start(server: SocketAddr, impairment: Impairment) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = front.local_addr().unwrap();
        let state = Arc::new(State {
            impairment,
            random: Mutex::new(StdRng::seed_from_u64(1)),
            dark: Mutex::default(),
        });
        let accepting = tokio::spawn(relay(front, server, state.clone())).abort_handle();
        Self { address, state, accepting }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loses everything from and to this address, or no longer.
    pub(crate) fn darken(&self, client: IpAddr, dark: bool) {
        let mut all = self.state.dark.lock().unwrap();
        if dark {
            all.insert(client)
        } else {
            all.remove(&client)
        };
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn relay(front: Arc<UdpSocket>, server: SocketAddr, state: Arc<State>) {
    let mut clients: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    // Aborted with this task.
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; 2048];
    // An error tells of an earlier datagram that nobody took.
    loop {
        let Ok((size, client)) = front.recv_from(&mut buffer).await else { continue };
        let back = if let Some(back) = clients.get(&client) {
            back.clone()
        } else {
            let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
            back.connect(server).await.unwrap();
            tasks.spawn(relay_back(back.clone(), front.clone(), client, state.clone()));
            clients.insert(client, back.clone());
            back
        };
        if let Some(delay) = state.fate(client.ip()) {
            let datagram = buffer[..size].to_vec();
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let _ = back.send(&datagram).await;
            });
        }
    }
}

async fn relay_back(back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr, state: Arc<State>) {
    let mut buffer = vec![0; 2048];
    loop {
        let Ok(size) = back.recv(&mut buffer).await else {
            // The server is down.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        if let Some(delay) = state.fate(client.ip()) {
            let (front, datagram) = (front.clone(), buffer[..size].to_vec());
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let _ = front.send_to(&datagram, client).await;
            });
        }
    }
}

/// Passes TCP connections on to a server until it is cut; then nothing connects. Ends when dropped.
pub(crate) struct TcpRelay {
    port: u16,
    server: tokio::sync::watch::Sender<Option<SocketAddr>>,
    cut: Arc<tokio::sync::watch::Sender<bool>>,
    /// What the clients have sent, all connections after each other.
    sent: Arc<Mutex<Vec<u8>>>,
    accepting: AbortHandle,
}

impl TcpRelay {
    pub(crate) async fn start(server: SocketAddr) -> Self {
        let relay = Self::reserve().await;
        relay.lead_to(server);
        relay
    }

    /// A relay whose server is not known yet: connections wait for it.
    pub(crate) async fn reserve() -> Self {
        Self::reserve_at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    pub(crate) async fn reserve_at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (server, leads_to) = tokio::sync::watch::channel(None);
        let cut = Arc::new(tokio::sync::watch::channel(false).0);
        let is_cut = cut.clone();
        let sent = Arc::<Mutex<Vec<u8>>>::default();
        let tap = sent.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let mut is_cut = is_cut.subscribe();
                if *is_cut.borrow() {
                    continue;
                }
                let (tap, mut leads_to) = (tap.clone(), leads_to.clone());
                connections.spawn(async move {
                    let passing = async {
                        let server = leads_to.wait_for(Option::is_some).await.ok().and_then(|server| *server);
                        let Some(server) = server else { return };
                        if let Ok(server) = TcpStream::connect(server).await {
                            pass(client, server, &tap).await;
                        }
                    };
                    tokio::select! {
                        () = passing => {}
                        _ = is_cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        })
        .abort_handle();
        Self { port, server, cut, sent, accepting }
    }

    pub(crate) fn lead_to(&self, server: SocketAddr) {
        self.server.send_replace(Some(server));
    }

    /// What the clients have sent so far, as text.
    pub(crate) fn sent(&self) -> String {
        String::from_utf8_lossy(&self.sent.lock().unwrap()).into_owned()
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends all connections and refuses new ones, or no longer.
    pub(crate) fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }
}

impl Drop for TcpRelay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn pass(client: TcpStream, server: TcpStream, tap: &Mutex<Vec<u8>>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async {
        let mut buffer = vec![0; 65536];
        while let Ok(size @ 1..) = from_client.read(&mut buffer).await {
            tap.lock().unwrap().extend_from_slice(&buffer[..size]);
            if to_server.write_all(&buffer[..size]).await.is_err() {
                return;
            }
        }
        drop(to_server.shutdown().await);
    };
    let down = async {
        drop(tokio::io::copy(&mut from_server, &mut to_client).await);
        drop(to_client.shutdown().await);
    };
    tokio::join!(up, down);
}
