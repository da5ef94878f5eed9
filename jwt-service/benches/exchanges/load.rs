//! Clients: connections that are kept, as those of a reverse proxy are, or one per request from an address of
//! its own.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use antiphon_jwt_service::RoomAlias;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};

/// Requests are numbered for the whole run: each has a user and a room of its own.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Which rooms are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rooms {
    /// Each exchange asks for its own.
    Many,
    /// All ask for the same, as when a large call begins.
    One,
}

/// One request for a token.
pub(crate) struct Exchange {
    pub(crate) number: u64,
    room: String,
    path: &'static str,
    body: String,
}

impl Exchange {
    /// The next one, at the homeserver `name`, for a room of its own: `/get_token` and `/sfu/get` in turn.
    pub(crate) fn next(name: &str) -> Self {
        Self::for_one_of(Rooms::Many, name)
    }

    /// The same for the room that everybody wants, or one of its own.
    pub(crate) fn for_one_of(rooms: Rooms, name: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let room = room(if rooms == Rooms::One { 0 } else { number });
        let (path, body) = if rooms == Rooms::One || number.is_multiple_of(2) {
            ("/get_token", get_token(number, &room, name, ""))
        } else {
            let token = openid_token(number, name);
            let body = format!(r#"{{"room":"{room}","openid_token":{token},"device_id":"DEVICE"}}"#);
            ("/sfu/get", body)
        };
        Self { number, room, path, body }
    }

    /// The next one, which brings a delayed leave along.
    pub(crate) fn with_leave(name: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let leave = format!(r#","delay_id":"syd_bench_delay_{number}","delay_timeout":2000000"#);
        let room = room(number);
        let body = get_token(number, &room, name, &leave);
        Self { number, room, path: "/get_token", body }
    }

    /// A request with this body, not for a token.
    pub(crate) fn plain(path: &'static str, body: String) -> Self {
        Self { number: 0, room: String::new(), path, body }
    }

    /// What the SFU calls its room.
    pub(crate) fn alias(&self) -> String {
        let slot = if self.path == "/get_token" { "m.call#ROOM" } else { antiphon_jwt_service::LEGACY_SLOT };
        RoomAlias::of_slot(&self.room, slot).as_str().to_owned()
    }

    fn bytes(&self, authorization: Option<&str>) -> Vec<u8> {
        let authorization =
            authorization.map_or_else(String::new, |token| format!("Authorization: {token}\r\n"));
        format!(
            "POST {} HTTP/1.1\r\nHost: jwt.example.org\r\nContent-Type: application/json\r\n{authorization}\
             Content-Length: {}\r\n\r\n{}",
            self.path,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

fn get_token(number: u64, room: &str, name: &str, leave: &str) -> String {
    format!(
        r#"{{"room_id":"{room}","slot_id":"m.call#ROOM","openid_token":{},"member":{{"id":"member-{number}","claimed_user_id":"@u{number}:{name}","claimed_device_id":"DEVICE"}}{leave}}}"#,
        openid_token(number, name)
    )
}

fn openid_token(number: u64, name: &str) -> String {
    json!({"access_token": format!("t{number}"), "token_type": "Bearer", "matrix_server_name": name, "expires_in": 3600})
        .to_string()
}

fn room(number: u64) -> String {
    format!("!room{number}:example.org")
}

/// One connection to the service.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// From any address of this machine.
    pub(crate) async fn connect(server: SocketAddr) -> Self {
        Self::connect_from(Ipv4Addr::LOCALHOST, server).await
    }

    pub(crate) async fn connect_from(source: Ipv4Addr, server: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((source, 0))).unwrap();
        let stream = socket.connect(server).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: Vec::with_capacity(4096) }
    }

    /// The status of the answer; the answer is read to its end.
    pub(crate) async fn send(&mut self, exchange: &Exchange) -> u16 {
        self.send_with(exchange, None).await
    }

    pub(crate) async fn send_with(&mut self, exchange: &Exchange, authorization: Option<&str>) -> u16 {
        self.stream.write_all(&exchange.bytes(authorization)).await.unwrap();
        self.buffer.clear();
        loop {
            let read = self.stream.read_buf(&mut self.buffer).await.unwrap();
            assert!(read > 0, "the service hung up: {}", String::from_utf8_lossy(&self.buffer));
            if let Some(status) = complete(&self.buffer) {
                return status;
            }
        }
    }
}

/// The status of an answer, if all of it is there.
fn complete(answer: &[u8]) -> Option<u16> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&answer[..end]).unwrap();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
    });
    let status = head.split(' ').nth(1)?.parse().unwrap();
    (answer.len() >= end + length.expect("an answer of known length")).then_some(status)
}

/// What came of a load.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Exchanges that ended with a token.
    pub(crate) good: u64,
    /// Others.
    pub(crate) bad: u64,
    pub(crate) latencies: Vec<Duration>,
    pub(crate) took: Duration,
}

impl Outcome {
    fn count(&mut self, status: u16, latency: Duration) {
        if status == 200 {
            self.good += 1;
            self.latencies.push(latency);
        } else {
            self.bad += 1;
        }
    }

    fn add(&mut self, other: Self) {
        self.good += other.good;
        self.bad += other.bad;
        self.latencies.extend(other.latencies);
    }
}

/// When a load ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Time(Duration),
    Exchanges(u64),
}

/// `concurrency` clients, each asking again as soon as it has its answer.
pub(crate) async fn closed_loop(
    server: SocketAddr,
    name: &str,
    rooms: Rooms,
    concurrency: usize,
    until: Until,
) -> Outcome {
    let began = Instant::now();
    let asked = Arc::new(AtomicU64::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..concurrency {
        let (name, asked) = (name.to_owned(), asked.clone());
        clients.spawn(async move {
            let mut client = Client::connect(server).await;
            let mut outcome = Outcome::default();
            while match until {
                Until::Time(time) => began.elapsed() < time,
                Until::Exchanges(number) => asked.fetch_add(1, Ordering::Relaxed) < number,
            } {
                let exchange = Exchange::for_one_of(rooms, &name);
                let sent = Instant::now();
                let status = client.send(&exchange).await;
                outcome.count(status, sent.elapsed());
            }
            outcome
        });
    }
    let mut total = Outcome::default();
    while let Some(outcome) = clients.join_next().await {
        total.add(outcome.unwrap());
    }
    total.took = began.elapsed();
    total
}

/// One exchange of an open loop: its number at the homeserver, its room at the SFU, the status, and how long it
/// took.
pub(crate) struct Paced {
    pub(crate) number: u64,
    pub(crate) alias: String,
    pub(crate) status: u16,
    pub(crate) latency: Duration,
}

/// `per_second` exchanges a second, whether or not earlier ones have their answers, so that a stall of the service
/// is not hidden by not asking. Connections are kept and more are made when all are in use.
pub(crate) async fn open_loop(server: SocketAddr, name: &str, per_second: u32, time: Duration) -> Vec<Paced> {
    let interval = Duration::from_secs(1) / per_second;
    let (give_back, mut idle) = tokio::sync::mpsc::channel::<Client>(4096);
    let mut exchanges = tokio::task::JoinSet::new();
    let began = Instant::now();
    let mut due = began;
    while due < began + time {
        tokio::time::sleep_until(due.into()).await;
        // The timer's own millisecond is not the service's: time counts from here.
        let sent = Instant::now();
        while due <= sent {
            let exchange = Exchange::next(name);
            let client = idle.try_recv().ok();
            let give_back = give_back.clone();
            exchanges.spawn(async move {
                let alias = exchange.alias();
                let mut client = match client {
                    Some(client) => client,
                    None => Client::connect(server).await,
                };
                let status = client.send(&exchange).await;
                let latency = sent.elapsed();
                // Full: there are enough.
                let _ = give_back.try_send(client);
                Paced { number: exchange.number, alias, status, latency }
            });
            due += interval;
        }
    }
    exchanges.join_all().await
}

/// The status and time of one request of a burst.
pub(crate) type Burst = Vec<(u16, Duration)>;

/// `number` requests at once, each on a new connection: from as many addresses, or from one.
pub(crate) async fn burst(server: SocketAddr, name: &str, number: u32, many_addresses: bool) -> Burst {
    let mut requests = tokio::task::JoinSet::new();
    let began = Instant::now();
    for n in 0..number {
        let exchange = Exchange::next(name);
        let low = u8::try_from(n % 250).unwrap_or_default() + 2;
        let high = u8::try_from(n / 250).unwrap_or(u8::MAX);
        let source = if many_addresses { Ipv4Addr::new(127, 0, high, low) } else { Ipv4Addr::LOCALHOST };
        requests.spawn(async move {
            let status = Client::connect_from(source, server).await.send(&exchange).await;
            (status, began.elapsed())
        });
    }
    requests.join_all().await
}

/// The `q`-th part of `sorted`, such as 0.99.
pub(crate) fn quantile(sorted: &[Duration], q: f64) -> Duration {
    if sorted.is_empty() {
        return Duration::ZERO;
    }
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}
