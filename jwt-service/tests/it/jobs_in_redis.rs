//! Jobs in Redis: in lk-jwt-service's format, through restarts of the server, with leases for several replicas,
//! and on servers that know next to nothing.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use antiphon_jwt_service::{
    DelegationConfig, LEGACY_SLOT, ParticipantIdentity, RoomAlias, Service,
    delegation::{DelayId, JobKey, JobParams, StoredJob},
    store::{self, RedisStore, Store as _, StoreConfig},
};
use antiphon_testkit::peers::{Peer, PeerError, ports, process::Process, require};
use axum::response::IntoResponse as _;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    time::timeout,
};
use tower::ServiceExt as _;

use crate::{
    delegated_leave::{Floor, signed},
    support::{DEADLINE, Homeserver, settings},
};

const HASH: &str = "lk-jwt:jobs";

fn key(device: &str) -> JobKey {
    JobKey {
        room: RoomAlias::of_slot("!room:example.com", LEGACY_SLOT),
        identity: ParticipantIdentity::legacy("@a:hs", device).unwrap(),
    }
}

fn job(device: &str, delay_id: &str) -> StoredJob {
    StoredJob {
        params: JobParams {
            key: key(device),
            server: "hs.example".parse().unwrap(),
            delay_id: DelayId::new(delay_id.to_owned()).unwrap(),
            delay_timeout: Duration::from_secs(8),
        },
        restarted_at: SystemTime::UNIX_EPOCH + Duration::new(1_769_847_300, 123_456_789),
        connected: None,
    }
}

/// The entry of `job(device, "syd_x")`, as the reference wrote it.
fn entry(device: &str) -> (String, String) {
    let room = "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs";
    (
        format!(r#"["{room}","@a:hs:{device}"]"#),
        format!(
            r#"{{"Params":{{"DelayId":"syd_x","DelayTimeout":8000000000,"ServerName":"hs.example","LiveKitRoom":"{room}","LiveKitIdentity":"@a:hs:{device}"}},"RestartedAt":"2026-01-31T09:15:00.123456789+01:00"}}"#
        ),
    )
}

fn store_at(url: &str) -> RedisStore {
    RedisStore::new(url.parse().unwrap(), RedisStore::DEFAULT_PREFIX)
}

/// Debian's server, on loopback, with everything on disk before it answers.
pub(crate) struct Redis {
    folder: tempfile::TempDir,
    port: u16,
    more: Vec<String>,
    pub(crate) process: Process,
}

impl Redis {
    pub(crate) async fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = ports::free().unwrap();
        let more: Vec<_> = more.iter().map(|text| (*text).to_owned()).collect();
        let process = Self::run(folder.path(), port, &more).await;
        Self { folder, port, more, process }
    }

    async fn run(folder: &Path, port: u16, more: &[String]) -> Process {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--dir"]).arg(folder);
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "always"]).args(more);
        let mut process = Process::start("Redis", command, &folder.join("log")).unwrap();
        // It listens before it has read its files, and refuses everything until then.
        let loaded = async || {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else { return false };
            let mut answer = [0; 8];
            let asked = stream.write_all(b"PING\r\n").await;
            asked.is_ok() && stream.read(&mut answer).await.is_ok() && answer != *b"-LOADING"
        };
        process.until("its files", DEADLINE, loaded).await.unwrap();
        process
    }

    /// Has it write everything down and end.
    pub(crate) async fn shut_down(&mut self) {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        // Its answer is that it is gone.
        let _ = redis::cmd("SHUTDOWN").query_async::<()>(&mut connection).await;
        let ended = self.process.until("its end", DEADLINE, async || false).await;
        assert!(matches!(ended, Err(PeerError::Ended { .. })), "{ended:?}");
    }

    /// Loses what it has written down.
    pub(crate) fn empty(&self) {
        std::fs::remove_dir_all(self.folder.path().join("appendonlydir")).unwrap();
    }

    pub(crate) async fn start_again(&mut self) {
        self.process = Self::run(self.folder.path(), self.port, &self.more).await;
    }

    pub(crate) fn url(&self) -> String {
        self.database(0)
    }

    pub(crate) fn database(&self, number: u8) -> String {
        format!("redis://127.0.0.1:{}/{number}", self.port)
    }

    /// What `redis-cli`'s user would see.
    pub(crate) async fn raw(&self, words: &[&str]) -> redis::Value {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async(&mut connection).await.unwrap()
    }

    pub(crate) async fn entries(&self) -> BTreeMap<String, String> {
        redis::from_redis_value(self.raw(&["HGETALL", HASH]).await).unwrap()
    }
}

#[tokio::test]
async fn what_the_reference_left_is_taken_over_and_what_is_left_is_its_own() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let store = store_at(&redis.url());
    store.check().await.unwrap();

    let (field, value) = entry("D");
    redis.raw(&["HSET", HASH, &field, &value]).await;
    // Go writes < as \u003c, and somebody may have written it as it is.
    let (plain, value) = entry("<");
    redis.raw(&["HSET", HASH, &plain, &value]).await;
    assert_eq!(store.load().await.unwrap(), [job("<", "syd_x"), job("D", "syd_x")]);

    store.put(&job("D", "new")).await.unwrap();
    store.put(&job("<", "new")).await.unwrap();
    store.put(&job("&", "syd_x")).await.unwrap();
    let escaped = entry(r"\u0026").0;
    let entries = redis.entries().await;
    assert_eq!(entries.keys().collect::<Vec<_>>(), [&plain, &field, &escaped], "no name changed");
    assert_eq!(entries[&escaped], entry("&").1.replace("09:15", "08:15").replace("+01:00", "Z"));

    for device in ["D", "<", "&", "never there"] {
        store.remove(&key(device)).await.unwrap();
    }
    assert!(redis.entries().await.is_empty());
}

/// The service around it: entries of the reference, whose encoder escapes `<`, `>` and `&`, and of somebody whose
/// encoder does not, are rewritten and removed under the names that they have.
#[tokio::test]
async fn jobs_of_the_reference_go_on_under_the_names_that_they_have() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let homeserver = Homeserver::start(|_| "{}".into_response()).await;
    let names = [entry(r"\u003cD\u0026\u003e").0, entry("<E&>").0];
    for (name, device) in names.iter().zip(["<D&>", "<E&>"]) {
        // From the future, so that it has not fired, whatever the time is now.
        let value = entry(device).1.replace("2026", "2126").replace("syd_x", device);
        redis.raw(&["HSET", HASH, name, &value]).await;
    }
    let mut settings = settings();
    let base = format!("https://{}", homeserver.name()).parse().unwrap();
    settings.cs_api_url_overrides = [("hs.example".to_owned(), base)].into();
    let (floor, store) = (Arc::new(Floor::default()), Arc::new(store_at(&redis.url())));
    let service = Service::with_store(settings, floor, store, DelegationConfig::new("heir")).unwrap();
    service.restore().await;
    let webhook = async |event: &str, device: &str| {
        let body = json!({
            "event": event, "room": {"name": key(device).room.as_str()},
            "participant": {"identity": key(device).identity.as_str()},
        });
        let answer = service.router().oneshot(signed(&body.to_string(), "devsecret", 60, "")).await;
        assert_eq!(answer.unwrap().status(), 200);
    };
    let until = async |ready: &dyn Fn(&BTreeMap<String, String>) -> bool| {
        let wait = async {
            while !ready(&redis.entries().await) {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, wait).await.expect("in time");
    };
    let mut sorted = names.to_vec();
    sorted.sort();
    for device in ["<D&>", "<E&>"] {
        webhook("participant_joined", device).await;
    }
    // A restart that succeeded is written down.
    until(&|entries| entries.values().all(|value| value.contains(r#""Connected":true"#))).await;
    assert_eq!(redis.entries().await.into_keys().collect::<Vec<_>>(), sorted);
    for device in ["<D&>", "<E&>"] {
        webhook("participant_left", device).await;
    }
    until(&BTreeMap::is_empty).await;
    let sent: Vec<_> = homeserver.seen().into_iter().filter(|seen| seen.path.ends_with("/send")).collect();
    assert_eq!(sent.len(), 2);
}

#[tokio::test]
async fn entries_that_are_no_job_are_purged_and_the_later_of_two_counts() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let (field, value) = entry("D");
    let (plain, older) = entry("<");
    let (escaped, newer) = (entry(r"\u003c").0, older.replace("syd_x", "later").replace("09:15", "09:16"));
    for (field, value) in [
        (&*field, &*value),
        ("nonsense", "nonsense"),
        ("{}", "{}"),
        ("", ""),
        (&*plain, &*older),
        (&*escaped, &*newer),
    ] {
        redis.raw(&["HSET", HASH, field, value]).await;
    }
    let mut later = job("<", "later");
    later.restarted_at += Duration::from_secs(60);
    assert_eq!(store_at(&redis.url()).load().await.unwrap(), [later, job("D", "syd_x")]);
    assert_eq!(redis.entries().await.into_keys().collect::<Vec<_>>(), [field, escaped]);
}

#[tokio::test]
async fn a_server_that_was_stopped_and_started_again_is_used_again() {
    require!(Peer::Redis);
    let mut redis = Redis::start(&[]).await;
    let store = store_at(&redis.url());
    store.put(&job("D", "1")).await.unwrap();

    // Without a command in between nobody notices.
    redis.process.kill().await.unwrap();
    redis.start_again().await;
    store.put(&job("E", "2")).await.unwrap();

    redis.process.kill().await.unwrap();
    for _ in 0..3 {
        let error = timeout(DEADLINE, store.put(&job("F", "3"))).await.unwrap().unwrap_err();
        assert!(error.source.to_string().contains("see that it is up"), "{}", error.source);
        store.check().await.unwrap_err();
    }
    redis.start_again().await;
    store.check().await.unwrap();
    store.put(&job("F", "3")).await.unwrap();
    assert_eq!(store.load().await.unwrap(), [job("D", "1"), job("E", "2"), job("F", "3")]);
}

#[tokio::test]
async fn a_service_that_starts_before_its_redis_finds_it_later() {
    require!(Peer::Redis);
    let mut redis = Redis::start(&[]).await;
    redis.process.kill().await.unwrap();
    let config = StoreConfig::Redis { url: redis.url().parse().unwrap(), prefix: "p:".into() };
    let store = store::open(&config).await.unwrap();
    store.load().await.unwrap_err();
    redis.start_again().await;
    store.put(&job("D", "1")).await.unwrap();
    assert_eq!(store.load().await.unwrap(), [job("D", "1")]);
    let prefixed = redis.raw(&["HLEN", "p:jobs"]).await;
    assert_eq!(prefixed, redis::Value::Int(1));
}

#[tokio::test]
async fn of_two_replicas_one_acts() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let replicas = [Arc::new(store_at(&redis.url())), Arc::new(store_at(&redis.url()))];
    let ttl = Duration::from_secs(600);
    for round in 0..50 {
        let key = key(&round.to_string());
        let contend = async |index: usize| {
            let name = format!("replica {index}");
            replicas[index].lease(&key, &name, ttl).await.unwrap()
        };
        let (first, second) = tokio::join!(contend(0), contend(1));
        assert!(first != second, "round {round}: {first} and {second}");
        let (winner, loser) = if first { (0, 1) } else { (1, 0) };
        assert!(contend(winner).await, "who has it may prolong it");
        assert!(!contend(loser).await);
        // Only its holder gives a lease up.
        replicas[loser].release(&key, &format!("replica {loser}")).await.unwrap();
        assert!(!contend(loser).await);
        replicas[winner].release(&key, &format!("replica {winner}")).await.unwrap();
        assert!(contend(loser).await);
    }
    // A lease is no entry of the reference's hash, and ends by itself if its holder dies.
    assert!(redis.entries().await.is_empty());
    let redis::Value::Array(keys) = redis.raw(&["KEYS", "lk-jwt:lease:*"]).await else { panic!() };
    assert_eq!(keys.len(), 50);
    for lease in keys {
        let lease: String = redis::from_redis_value(lease).unwrap();
        let left: i64 = redis::from_redis_value(redis.raw(&["PTTL", &lease]).await).unwrap();
        assert!((1..=600_000).contains(&left), "{left}");
    }
}

#[tokio::test]
async fn what_one_tells_all_hear_until_the_server_goes() {
    require!(Peer::Redis);
    let mut redis = Redis::start(&[]).await;
    let (listener, teller) = (Arc::new(store_at(&redis.url())), store_at(&redis.url()));
    let listen = || {
        let (listener, (send, receive)) = (listener.clone(), mpsc::channel(8));
        let heard = move |message: &[u8]| send.try_send(message.to_vec()).unwrap();
        (tokio::spawn(async move { listener.listen(&heard).await }), receive)
    };
    for _ in 0..2 {
        let (listening, mut heard) = listen();
        let said = async {
            // Until the subscription is there nobody hears anything.
            while heard.is_empty() {
                teller.tell(b"\xffhello").await.unwrap();
                tokio::task::yield_now().await;
            }
            heard.recv().await.unwrap()
        };
        assert_eq!(timeout(DEADLINE, said).await.expect("heard in time"), b"\xffhello");
        redis.process.kill().await.unwrap();
        let ended = timeout(DEADLINE, listening).await.expect("noticed in time").unwrap();
        ended.unwrap_err();
        redis.start_again().await;
    }
}

#[tokio::test]
async fn a_lease_ends_with_its_time() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let store = store_at(&redis.url());
    assert!(store.lease(&key("D"), "dead", Duration::from_millis(50)).await.unwrap());
    let taken = async {
        while !store.lease(&key("D"), "heir", Duration::from_secs(60)).await.unwrap() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, taken).await.expect("the lease of the dead ends");
    assert!(!store.lease(&key("D"), "dead", Duration::from_secs(60)).await.unwrap());
}

#[tokio::test]
async fn passwords_databases_and_unix_sockets_work_and_a_wrong_password_is_said() {
    require!(Peer::Redis);
    let redis = Redis::start(&["--requirepass", "hunter2", "--unixsocket", "socket"]).await;
    let socket = redis.folder.path().join("socket");
    for url in [
        format!("redis://:hunter2@127.0.0.1:{}", redis.port),
        format!("redis://default:hunter2@127.0.0.1:{}/3", redis.port),
        format!("unix://{}?db=5&password=hunter2", socket.display()),
    ] {
        let store = store_at(&url);
        assert!(store.load().await.unwrap().is_empty(), "{store:?}: another database");
        store.put(&job("D", "1")).await.unwrap();
        assert_eq!(store.load().await.unwrap(), [job("D", "1")]);
    }
    for wrong in ["", ":hunter3@"] {
        let store = store_at(&format!("redis://{wrong}127.0.0.1:{}", redis.port));
        let source = store.check().await.unwrap_err().source.to_string();
        assert!(source.contains("refused the password") && !source.contains("hunter"), "{source}");
    }
}

const TLS_URL: &str = "ANTIPHON_TEST_REDIS_URL";

#[tokio::test]
#[ignore = "this is the process that the test below starts with another root certificate"]
async fn tls_client() {
    let store = store_at(&std::env::var(TLS_URL).unwrap());
    store.put(&job("D", "1")).await.unwrap();
    assert_eq!(store.load().await.unwrap(), [job("D", "1")]);
}

#[tokio::test]
async fn tls_is_verified() {
    require!(Peer::Redis);
    let folder = tempfile::tempdir().unwrap();
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, private) = (folder.path().join("cert"), folder.path().join("key"));
    std::fs::write(&certificate, own.cert.pem()).unwrap();
    std::fs::write(&private, own.signing_key.serialize_pem()).unwrap();
    let tls = ports::free().unwrap();
    let redis = Redis::start(&[
        "--tls-port",
        &tls.to_string(),
        "--tls-cert-file",
        certificate.to_str().unwrap(),
        "--tls-key-file",
        private.to_str().unwrap(),
        "--tls-auth-clients",
        "no",
    ])
    .await;
    let url = format!("rediss://127.0.0.1:{tls}");

    let source = store_at(&url).check().await.unwrap_err().source.to_string();
    assert!(source.contains("no connection to the Redis server at rediss://"), "{source}");
    assert!(redis.entries().await.is_empty());

    let mut client = Command::new(std::env::current_exe().unwrap());
    client.args(["--exact", "jobs_in_redis::tls_client", "--ignored"]);
    client.env(TLS_URL, url).env("SSL_CERT_FILE", &certificate).kill_on_drop(true);
    let output = timeout(DEADLINE, client.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(redis.entries().await.len(), 1);
}

/// A server that speaks RESP2 and knows four commands. It quotes what it does not know, as Redis does.
struct Minimal {
    url: String,
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
}

impl Minimal {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://{}/0", listener.local_addr().unwrap());
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let connections = Arc::<AtomicUsize>::default();
        let entries = Arc::<Mutex<BTreeMap<String, String>>>::default();
        let (log, count) = (seen.clone(), connections.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(Self::serve(stream, log.clone(), entries.clone()));
            }
        });
        Self { url, seen, connections }
    }

    async fn serve(
        stream: TcpStream,
        seen: Arc<Mutex<Vec<String>>>,
        entries: Arc<Mutex<BTreeMap<String, String>>>,
    ) {
        let mut stream = BufReader::new(stream);
        while let Some(words) = Self::command(&mut stream).await {
            seen.lock().unwrap().push(words[0].clone());
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            let answer = match words[..] {
                ["PING"] => "+PONG\r\n".to_owned(),
                ["HSET", HASH, field, value] => {
                    let old = entries.lock().unwrap().insert(field.to_owned(), value.to_owned());
                    format!(":{}\r\n", u8::from(old.is_none()))
                }
                ["HDEL", HASH, field] => {
                    format!(":{}\r\n", u8::from(entries.lock().unwrap().remove(field).is_some()))
                }
                ["HGETALL", HASH] => {
                    let entries = entries.lock().unwrap();
                    let bulk = |text: &String| format!("${}\r\n{text}\r\n", text.len());
                    let all: String =
                        entries.iter().map(|(field, value)| bulk(field) + &bulk(value)).collect();
                    format!("*{}\r\n{all}", 2 * entries.len())
                }
                _ => format!("-ERR unknown command, with args beginning with: {words:?}\r\n"),
            };
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    async fn command(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
        async fn number(stream: &mut BufReader<TcpStream>, kind: char) -> Option<usize> {
            let mut line = String::new();
            stream.read_line(&mut line).await.ok()?;
            line.strip_prefix(kind)?.trim().parse().ok()
        }
        let mut words = Vec::new();
        for _ in 0..number(stream, '*').await? {
            let mut word = vec![0; number(stream, '$').await? + 2];
            stream.read_exact(&mut word).await.ok()?;
            words.push(String::from_utf8(word).ok()?.trim_end().to_owned());
        }
        Some(words)
    }
}

#[tokio::test]
async fn four_commands_are_enough() {
    let server = Minimal::start().await;
    let store = store_at(&server.url);
    store.check().await.unwrap();
    store.put(&job("D", "1")).await.unwrap();
    store.put(&job("E", "2")).await.unwrap();
    store.remove(&key("D")).await.unwrap();
    assert_eq!(store.load().await.unwrap(), [job("E", "2")]);

    // No leases here: everybody may act, and the server is asked once.
    for replica in ["one", "two"] {
        assert!(store.lease(&key("E"), replica, Duration::from_secs(60)).await.unwrap());
        store.release(&key("E"), replica).await.unwrap();
    }
    // Nor does one replica hear the other, which is no error.
    for _ in 0..2 {
        store.tell(b"hello").await.unwrap();
    }
    let expected = ["PING", "HSET", "HSET", "HDEL", "HGETALL", "EVAL", "PUBLISH"];
    assert_eq!(*server.seen.lock().unwrap(), expected);
    assert_eq!(server.connections.load(Ordering::Relaxed), 1, "a refusal costs no connection");
    timeout(DEADLINE, store.listen(&|_: &[u8]| {})).await.expect("refused at once").unwrap();
    assert_eq!(server.seen.lock().unwrap().last().unwrap(), "SUBSCRIBE");
}

#[tokio::test]
async fn a_refused_command_is_not_quoted() {
    let server = Minimal::start().await;
    let store = RedisStore::new(server.url.parse().unwrap(), "other:");
    let error = store.put(&job("D", "secret-delay-id")).await.unwrap_err();
    let text = format!("{error} {error:?} {}", error.source);
    assert!(text.contains("answered ERR") && !text.contains("secret-delay-id"), "{text}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_costs_bounded_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let store = store_at(&format!("redis://{}", listener.local_addr().unwrap()));
    let error = timeout(DEADLINE, store.check()).await.expect("not for ever").unwrap_err();
    assert!(error.source.to_string().contains("does not answer in time"), "{}", error.source);
}
