//! Several replicas on one Redis: whichever gets the webhook or the newest delegation, one acts, and only one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use antiphon_jwt_service::{
    DelegationConfig, ParticipantIdentity, RoomAlias, Service, Settings, store::RedisStore,
};
use antiphon_testkit::peers::{Peer, require};
use axum::{
    Router,
    body::Body,
    http::Request,
    response::{IntoResponse, Response},
};
use serde_json::json;
use tower::ServiceExt as _;

use crate::{
    child::Program,
    delegated_leave::{Floor, signed},
    jobs_in_redis::Redis,
    support::{DEADLINE, Homeserver, get_token, settings, userinfo},
};

/// What Element Call has for a delay.
const EIGHT_SECONDS: Duration = Duration::from_secs(8);

/// A homeserver, a Redis server and two replicas of the service that have found each other.
struct World {
    homeserver: Homeserver,
    redis: Redis,
    floor: Arc<Floor>,
    services: Vec<Service>,
    webhooks: AtomicU64,
}

impl World {
    async fn new() -> Self {
        let homeserver = Homeserver::start(|seen| {
            if seen.path.contains("/delayed_events/") {
                "{}".into_response()
            } else {
                userinfo(seen, &[("good", "alice")])
            }
        })
        .await;
        let redis = Redis::start(&[]).await;
        let floor = Arc::new(Floor::default());
        let mut settings = settings();
        let base = format!("https://{}", homeserver.name()).parse().unwrap();
        settings.cs_api_url_overrides = [(homeserver.name(), base)].into();
        let mut services = Vec::new();
        for name in ["one", "two"] {
            services.push(replica(&settings, &floor, &redis, name).await);
        }
        let world = Self { homeserver, redis, floor, services, webhooks: AtomicU64::new(0) };
        world.until("both listen", async || listeners(&world.redis, 2).await).await;
        world
    }

    async fn until(&self, what: &str, ready: impl AsyncFnMut() -> bool) {
        assert!(until(ready).await, "{what}: {:?}", self.calls());
    }

    /// Delegates `delay_id` for alice at a replica. Its delay is an hour: nothing happens by itself.
    async fn delegate(&self, replica: usize, delay_id: &str) {
        self.delegate_for(replica, delay_id, Duration::from_hours(1)).await;
    }

    async fn delegate_for(&self, replica: usize, delay_id: &str, delay: Duration) {
        let mut body = get_token(&self.homeserver.name(), "good", "alice");
        body["delay_id"] = json!(delay_id);
        body["delay_timeout"] = json!(u64::try_from(delay.as_millis()).unwrap());
        let request = Request::post("/delegate_delayed_leave").body(Body::from(body.to_string())).unwrap();
        assert_eq!(self.ask(replica, request).await, 200);
    }

    /// A webhook about alice at a replica.
    async fn webhook(&self, replica: usize, event: &str, sid: &str) {
        let number = self.webhooks.fetch_add(1, Ordering::Relaxed);
        let user = format!("@alice:{}", self.homeserver.name());
        let identity = ParticipantIdentity::of_member(&user, "DEVICE", "member-1");
        let body = json!({
            "event": event, "id": format!("EV_{number}"), "createdAt": "0",
            "room": {"name": RoomAlias::of_slot("!room:hs", "m.call#ROOM").as_str()},
            "participant": {"identity": identity.as_str(), "sid": sid, "disconnectReason": "SIGNAL_CLOSE"},
        });
        assert_eq!(self.ask(replica, signed(&body.to_string(), "devsecret", 60, "")).await, 200);
    }

    async fn ask(&self, replica: usize, request: Request<Body>) -> u16 {
        let router: Router = self.services[replica].router();
        let answer: Response =
            tokio::time::timeout(DEADLINE, router.oneshot(request)).await.expect("in time").unwrap();
        answer.status().as_u16()
    }

    fn calls(&self) -> Vec<String> {
        let calls = self.homeserver.seen().into_iter().map(|seen| seen.path);
        calls.filter_map(|path| Some(path.split_once("/delayed_events/")?.1.to_owned())).collect()
    }

    async fn called(&self, call: &str) {
        self.until(call, async || self.calls().iter().any(|seen| seen == call)).await;
    }

    async fn nothing_stored(&self) {
        self.until("an empty store", async || self.redis.entries().await.is_empty()).await;
    }

    fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|seen| *seen == call).count()
    }
}

/// Whether it is `ready` before the deadline.
async fn until(mut ready: impl AsyncFnMut() -> bool) -> bool {
    let wait = async {
        while !ready().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.is_ok()
}

/// Whether so many processes listen to notices.
async fn listeners(redis: &Redis, count: i64) -> bool {
    const CHANNEL: &str = "lk-jwt:notices";
    let answer = redis.raw(&["PUBSUB", "NUMSUB", CHANNEL]).await;
    answer
        == redis::Value::Array(vec![
            redis::Value::BulkString(CHANNEL.as_bytes().to_vec()),
            redis::Value::Int(count),
        ])
}

async fn replica(settings: &Settings, floor: &Arc<Floor>, redis: &Redis, name: &str) -> Service {
    let store = RedisStore::new(redis.url().parse().unwrap(), RedisStore::DEFAULT_PREFIX);
    let config = DelegationConfig::new(name);
    let service = Service::with_store(settings.clone(), floor.clone(), Arc::new(store), config).unwrap();
    service.restore().await;
    service
}

#[tokio::test]
async fn a_webhook_at_either_replica_leads_to_one_leave() {
    require!(Peer::Redis);
    let world = World::new().await;
    world.delegate(0, "syd_1").await;
    world.webhook(1, "participant_joined", "PA_1").await;
    world.called("syd_1/restart").await;
    // With an hour's delay and no sanity check only this webhook can lead to the leave.
    world.webhook(1, "participant_left", "PA_1").await;
    world.webhook(0, "participant_left", "PA_1").await;
    world.called("syd_1/send").await;
    world.nothing_stored().await;
    assert_eq!(world.calls(), ["syd_1/restart", "syd_1/send"]);
}

#[tokio::test]
async fn the_newest_delegation_counts_at_whichever_replica_it_is() {
    require!(Peer::Redis);
    let world = World::new().await;
    world.delegate(0, "syd_1").await;
    world.webhook(0, "participant_joined", "PA_1").await;
    world.called("syd_1/restart").await;
    *world.floor.present.lock().unwrap() = Some(true);
    world.delegate(1, "syd_2").await;
    world.called("syd_2/restart").await;
    let entries: Vec<_> = world.redis.entries().await.into_values().collect();
    assert!(entries.len() == 1 && entries[0].contains("syd_2"), "{}", entries.len());
    assert_eq!(world.services[0].delegation_stats().unwrap().connected, 0, "given up");
    // And back again.
    world.delegate(0, "syd_3").await;
    world.called("syd_3/restart").await;
    world.webhook(1, "participant_left", "PA_1").await;
    world.called("syd_3/send").await;
    world.nothing_stored().await;
    assert_eq!([world.count("syd_1/send"), world.count("syd_2/send"), world.count("syd_3/send")], [0, 0, 1]);
}

#[tokio::test]
async fn a_short_delay_outlives_the_replica_that_restarted_it() {
    require!(Peer::Redis);
    let mut world = World::new().await;
    world.delegate_for(0, "syd_1", EIGHT_SECONDS).await;
    world.webhook(0, "participant_joined", "PA_1").await;
    world.called("syd_1/restart").await;
    *world.floor.present.lock().unwrap() = Some(true);
    // As in a crash, nobody gives the lease up.
    drop(world.services.remove(0));
    let again = world.until("a restart by the other", async || world.count("syd_1/restart") > 1);
    tokio::time::timeout(EIGHT_SECONDS, again).await.expect("before the homeserver sends the event");
    world.webhook(0, "participant_left", "PA_1").await;
    world.called("syd_1/send").await;
    world.nothing_stored().await;
}

#[tokio::test]
async fn a_replica_that_stops_leaves_its_jobs_to_the_other() {
    require!(Peer::Redis);
    let world = World::new().await;
    world.delegate(0, "syd_1").await;
    world.webhook(0, "participant_joined", "PA_1").await;
    world.called("syd_1/restart").await;
    *world.floor.present.lock().unwrap() = Some(true);
    world.services[0].shutdown(DEADLINE).await;
    // The lease of an hour's delay lasts 15 s: it was given up.
    let again = world.until("a restart by the other", async || world.count("syd_1/restart") > 1);
    tokio::time::timeout(Duration::from_secs(10), again).await.expect("before the lease would run out");
    world.webhook(1, "participant_left", "PA_1").await;
    world.called("syd_1/send").await;
    world.nothing_stored().await;
    assert_eq!(world.count("syd_1/send"), 1);
}

#[tokio::test]
async fn two_processes_of_one_name_are_told_so() {
    require!(Peer::Redis);
    let redis = Redis::start(&[]).await;
    let process = async |name: &str| {
        let mut program = Program::alone();
        program.set("LIVEKIT_REDIS_URL", redis.url()).set("LIVEKIT_JWT_REPLICA", name).start().await;
        program
    };
    let one = process("one").await;
    assert!(until(async || listeners(&redis, 1).await).await, "it listens");
    let _two = process("two").await;
    let _another_one = process("one").await;
    assert!(until(async || one.log().tail().contains("LIVEKIT_JWT_REPLICA")).await, "a warning");
    assert_eq!(one.log().tail().matches("has our name").count(), 1, "{}", one.log().tail());
}
