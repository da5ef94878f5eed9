//! Redis is killed, comes back, is shut down and comes back with nothing in it, while clients delegate their leaves:
//! none of them notices, the store has every job in the end, and operators are told the truth.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use antiphon_testkit::peers::{Peer, require};
use axum::{
    Json, Router,
    body::Bytes,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use livekit_protocol::{ParticipantInfo, Room, RoomParticipantIdentity};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet, time::interval};

use crate::{
    child::Program,
    jobs_in_redis::Redis,
    support::{DEADLINE, Homeserver, Seen, USERINFO, get_token},
};

const CLIENTS: usize = 20;
const MEMBERS: usize = 5;
/// Between two requests of one client.
const PACE: Duration = Duration::from_millis(100);
/// How many requests are to be answered in each state of the store.
const MANY: usize = 200;
/// The store is tried again after 15 s at the latest, and swept again 15 s after it could not be read.
const WRITTEN: Duration = Duration::from_secs(45);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_no_request_fails() {
    require!(Peer::Redis);
    let (mut redis, homeserver, sfu) = tokio::join!(Redis::start(&[]), Homeserver::start(answer), sfu());
    let name = homeserver.name();
    let mut service = Program::new();
    service
        .set("LIVEKIT_URL", sfu)
        .set("LIVEKIT_KEY", "devkey")
        .set("LIVEKIT_SECRET", "devsecret")
        .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name)
        .set("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
        .set("LIVEKIT_CS_API_URL_OVERRIDES", format!("{name}=https://{name}"))
        // All clients are at one address.
        .set("LIVEKIT_JWT_ADDRESS_RATE", "0")
        .set("LIVEKIT_REDIS_URL", redis.url())
        .start()
        .await;
    let load = Load::start(&service, &name);

    load.answered(MANY).await;
    assert_eq!(health(&service).await, (200, 200, "ok".into()));
    assert_eq!(service.metric("store_errors_total{operation=\"put\"}").await, 0);

    redis.process.kill().await.unwrap();
    told(&service, 503, "down").await;
    load.answered(MANY).await;
    assert_eq!(health(&service).await, (200, 503, "down".into()));
    assert_eq!(service.metric("up{part=\"store\"}").await, 0);
    assert!(service.metric("store_errors_total{operation=\"put\"}").await > 0);
    assert!(service.metric(UNWRITTEN).await > 0);
    redis.start_again().await;
    told(&service, 200, "ok").await;
    assert_eq!(service.metric("up{part=\"store\"}").await, 1);
    load.answered(MANY).await;

    redis.shut_down().await;
    told(&service, 503, "down").await;
    load.answered(MANY).await;
    // From here on nobody delegates the same leaves anew: what the store lacks, the service has to know.
    let jobs = load.stop().await;
    assert_eq!(jobs.len(), CLIENTS * (MEMBERS + 1));
    // Debian's server saves now and then: after a crash it may have nothing.
    redis.empty();
    redis.start_again().await;
    told(&service, 200, "ok").await;
    let complete = async {
        while service.metric(UNWRITTEN).await > 0 || written(&redis).await != jobs {
            tokio::time::sleep(PACE).await;
        }
    };
    if tokio::time::timeout(WRITTEN, complete).await.is_err() {
        let missing: Vec<_> = jobs.difference(&written(&redis).await).cloned().collect();
        panic!("not in Redis: {missing:?}\n{}", service.log().tail());
    }
    assert_eq!(service.jobs().await, u64::try_from(jobs.len()).unwrap());
}

const UNWRITTEN: &str = "store_unwritten{kind=\"job\"}";

/// Clients that go on and on: each is a user with some members, whose leaves they delegate in turn.
struct Load {
    clients: JoinSet<BTreeMap<usize, String>>,
    answered: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
}

impl Load {
    fn start(service: &Program, server: &str) -> Self {
        let (answered, stopped) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (answered, stopped) = (answered.clone(), stopped.clone());
            let (url, user) = (service.url("/get_token"), format!("user{client}"));
            let mut body = get_token(server, &user, &user);
            let http = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
            clients.spawn(async move {
                let mut delegated = BTreeMap::new();
                let mut pace = interval(PACE);
                for number in 0.. {
                    pace.tick().await;
                    // The first one is delegated once, and the store has it before any trouble begins.
                    let member = if number == 0 { MEMBERS } else { number % MEMBERS };
                    let delay_id = format!("syd_{user}_{number}");
                    body["member"]["id"] = format!("member{member}").into();
                    body["delay_id"] = delay_id.clone().into();
                    body["delay_timeout"] = 3_600_000.into();
                    let answer = http.post(&url).json(&body).send().await.unwrap();
                    let (status, text) = (answer.status(), answer.text().await.unwrap());
                    assert_eq!(status, 200, "{text}");
                    delegated.insert(member, delay_id);
                    answered.fetch_add(1, Ordering::Relaxed);
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                }
                delegated
            });
        }
        Self { clients, answered, stopped }
    }

    /// Waits until so many more requests have been answered well.
    async fn answered(&self, more: usize) {
        let enough = self.answered.load(Ordering::Relaxed) + more;
        let answered = async {
            while self.answered.load(Ordering::Relaxed) < enough {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::time::timeout(DEADLINE, answered).await.expect("requests are answered");
    }

    /// Ends it and says which delayed events are delegated now. Fails if any request did.
    async fn stop(self) -> BTreeSet<String> {
        self.stopped.store(true, Ordering::Relaxed);
        self.clients.join_all().await.into_iter().flat_map(BTreeMap::into_values).collect()
    }
}

/// The status of `/healthz` and of `/readyz`, and what that says about the store.
async fn health(service: &Program) -> (u16, u16, String) {
    let (alive, _) = service.operators("/healthz").await;
    let (ready, body) = service.operators("/readyz").await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["sfu"], "ok");
    (alive, ready, body["store"].as_str().unwrap().to_owned())
}

/// Waits until `/readyz` says so.
async fn told(service: &Program, status: u16, store: &str) {
    let told = async {
        loop {
            let (alive, ready, said) = health(service).await;
            assert_eq!(alive, 200);
            if (ready, said.as_str()) == (status, store) {
                return;
            }
            tokio::time::sleep(PACE).await;
        }
    };
    tokio::time::timeout(DEADLINE, told).await.expect("the truth is told");
}

/// The delayed events of the jobs in Redis. Whoever has connected must be written down as connected: what
/// happened while the store was down is told it too.
async fn written(redis: &Redis) -> BTreeSet<String> {
    let job = |value: String| -> Option<String> {
        let job: Value = serde_json::from_str(&value).unwrap();
        let connected = present(job["Params"]["LiveKitIdentity"].as_str()?);
        (job["Connected"] == connected).then_some(job["Params"]["DelayId"].as_str()?.to_owned())
    };
    redis.entries().await.into_values().filter_map(job).collect()
}

/// A homeserver whose users have their names as tokens, and whose delayed events can always be restarted.
fn answer(seen: &Seen) -> Response {
    if seen.path != USERINFO {
        return (StatusCode::OK, "{}").into_response();
    }
    let query = seen.query.as_deref().unwrap_or_default();
    let token = query.strip_prefix("access_token=").unwrap();
    Json(json!({"sub": format!("@{token}:{}", seen.host)})).into_response()
}

/// Half of all participants have connected.
fn present(identity: &str) -> bool {
    identity.bytes().map(usize::from).sum::<usize>() % 2 == 0
}

/// An SFU with whoever is [`present`]; its URL.
async fn sfu() -> String {
    let create = async || Room { sid: "RM_1".into(), ..Default::default() }.encode_to_vec();
    let participant = async |body: Bytes| {
        let asked = RoomParticipantIdentity::decode(body).unwrap();
        if present(&asked.identity) {
            ParticipantInfo { sid: "PA_1".into(), ..Default::default() }.encode_to_vec().into_response()
        } else {
            let unknown = json!({"code": "not_found", "msg": "participant does not exist"});
            (StatusCode::NOT_FOUND, Json(unknown)).into_response()
        }
    };
    let router = Router::new()
        .route("/", get(|| async { "OK" }))
        .route("/twirp/livekit.RoomService/CreateRoom", post(create))
        .route("/twirp/livekit.RoomService/GetParticipant", post(participant));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}
