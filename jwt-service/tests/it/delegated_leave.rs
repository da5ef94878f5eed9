//! Delegated leave from end to end: a client over HTTP, a homeserver over TLS, the SFU's webhooks, a store that
//! outlives the service.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_jwt_service::{
    DelegationConfig, FullAccess, ParticipantIdentity, RoomAlias, Service, Settings, Sfu, SfuError,
    SfuParticipant, SfuRoom,
    delegation::{JobKey, Lateness, StoredJob},
    store::{MemoryStore, Store, StoreError},
};
use async_trait::async_trait;
use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Method, Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tower::ServiceExt as _;

use crate::support::{Client, DEADLINE, Homeserver, Seen, get_token, settings, sfu_get, userinfo};

const USERS: &[(&str, &str)] = &[("good", "alice")];
const STABLE: &str = "/_matrix/client/v1/delayed_events/";
const UNSTABLE: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";

/// A store in this test's memory, so that it outlives the service.
#[derive(Debug, Default)]
struct Shelf {
    jobs: Mutex<HashMap<JobKey, StoredJob>>,
    broken: bool,
}

impl Shelf {
    fn ids(&self) -> Vec<String> {
        let jobs = self.jobs.lock().unwrap();
        jobs.values().map(|job| job.params.delay_id.as_str().to_owned()).collect()
    }

    fn answer<T>(&self, answer: T) -> Result<T, StoreError> {
        if self.broken {
            Err(StoreError { kind: "memory", doing: "work", source: "broken".into() })
        } else {
            Ok(answer)
        }
    }
}

#[async_trait]
impl Store for Shelf {
    async fn put(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.answer(())?;
        self.jobs.lock().unwrap().insert(job.params.key.clone(), job.clone());
        Ok(())
    }

    async fn remove(&self, key: &JobKey) -> Result<(), StoreError> {
        self.answer(())?;
        self.jobs.lock().unwrap().remove(key);
        Ok(())
    }

    async fn load(&self) -> Result<Vec<StoredJob>, StoreError> {
        self.answer(self.jobs.lock().unwrap().values().cloned().collect())
    }

    async fn lease(&self, _: &JobKey, _: &str, _: Duration) -> Result<bool, StoreError> {
        self.answer(true)
    }

    async fn release(&self, _: &JobKey, _: &str) -> Result<(), StoreError> {
        self.answer(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.answer(())
    }

    fn kind(&self) -> &'static str {
        "memory"
    }
}

/// An SFU that knows who is there; one that is down does not say.
#[derive(Default)]
pub(crate) struct Floor {
    pub(crate) present: Mutex<Option<bool>>,
    /// How many were asked for at once, for each time.
    rounds: Mutex<Vec<usize>>,
}

#[async_trait]
impl Sfu for Floor {
    async fn create_room(&self, _: &str) -> Result<SfuRoom, SfuError> {
        Ok(SfuRoom::new("RM_1"))
    }

    async fn participant(&self, _: &str, _: &str) -> Result<Option<SfuParticipant>, SfuError> {
        match *self.present.lock().unwrap() {
            Some(present) => Ok(present.then(|| SfuParticipant::new("PA_1"))),
            None => Err(SfuError::NotOffered),
        }
    }

    async fn participants(
        &self,
        room: &str,
        identities: &[&str],
    ) -> Result<Vec<Option<SfuParticipant>>, SfuError> {
        self.rounds.lock().unwrap().push(identities.len());
        let one = self.participant(room, "anybody").await?;
        Ok(vec![one; identities.len()])
    }
}

/// A service that keeps the leave `syd_1` of alice, a user of `server` who is on the SFU.
pub(crate) async fn keeping_a_leave(settings: Settings, server: &str, delay: Duration) -> Service {
    let floor = Arc::new(Floor::default());
    *floor.present.lock().unwrap() = Some(true);
    let (store, config) = (Arc::new(MemoryStore::new()), DelegationConfig::new("test"));
    let service = Service::with_store(settings, floor, store, config).unwrap();
    service.restore().await;
    let mut body = get_token(server, "good", "alice");
    body["delay_id"] = json!("syd_1");
    body["delay_timeout"] = json!(u64::try_from(delay.as_millis()).unwrap());
    let client = Client::of(service.clone());
    assert_eq!(client.post("/delegate_delayed_leave", body).await.status, 200);
    service
}

/// A deployment: the service, and everything around it.
struct World {
    homeserver: Homeserver,
    called: Arc<Notify>,
    answer: Arc<Mutex<StatusCode>>,
    /// Whether the homeserver has the stable paths, and whether it says so.
    stable: Arc<Mutex<(bool, bool)>>,
    /// Whether the homeserver says where its client-server API is.
    well_known: Arc<AtomicBool>,
    shelf: Arc<Shelf>,
    floor: Arc<Floor>,
    settings: Settings,
    service: Service,
    router: Router,
    /// Makes every webhook's body differ.
    webhooks: Mutex<u64>,
}

impl World {
    async fn new() -> Self {
        Self::with(|_| {}, false).await
    }

    async fn with(change: impl FnOnce(&mut Settings), broken_store: bool) -> Self {
        let (called, answer) = (Arc::new(Notify::new()), Arc::new(Mutex::new(StatusCode::OK)));
        let stable = Arc::<Mutex<(bool, bool)>>::default();
        let well_known = Arc::<AtomicBool>::default();
        let homeserver = Homeserver::start({
            let (called, answer, stable) = (called.clone(), answer.clone(), stable.clone());
            let well_known = well_known.clone();
            move |seen| {
                called.notify_waiters();
                let (has_stable, says_stable) = *stable.lock().unwrap();
                if seen.path == "/_matrix/client/versions" && says_stable {
                    let versions =
                        json!({"versions": ["v1.18"], "unstable_features": {"org.matrix.msc4140.stable": true}});
                    versions.to_string().into_response()
                } else if seen.path == "/.well-known/matrix/client" && well_known.load(Ordering::Relaxed) {
                    let base = format!("https://{}", seen.host);
                    json!({"m.homeserver": {"base_url": base}}).to_string().into_response()
                } else if seen.path.starts_with(STABLE) && !has_stable {
                    (StatusCode::NOT_FOUND, json!({"errcode": "M_UNRECOGNIZED"}).to_string()).into_response()
                } else if seen.path.contains("/delayed_events/") {
                    (*answer.lock().unwrap(), "{}").into_response()
                } else {
                    userinfo(seen, USERS)
                }
            }
        })
        .await;
        let mut settings = settings();
        let base = format!("https://{}", homeserver.name()).parse().unwrap();
        settings.cs_api_url_overrides = [(homeserver.name(), base)].into();
        change(&mut settings);
        let shelf = Arc::new(Shelf { broken: broken_store, ..Shelf::default() });
        let floor = Arc::new(Floor::default());
        let service = start(&settings, &floor, &shelf).await;
        let (router, webhooks) = (service.router(), Mutex::new(0));
        Self {
            homeserver,
            called,
            answer,
            stable,
            well_known,
            shelf,
            floor,
            settings,
            service,
            router,
            webhooks,
        }
    }

    /// The service dies without a word, and another one starts.
    async fn restart(&mut self) {
        self.service = start(&self.settings, &self.floor, &self.shelf).await;
        self.router = self.service.router();
    }

    async fn request(&self, request: Request<Body>) -> (u16, String) {
        let answer = tokio::time::timeout(DEADLINE, self.router.clone().oneshot(request)).await;
        let (parts, body) = answer.expect("answered in time").unwrap().into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        (parts.status.as_u16(), String::from_utf8(body.to_vec()).unwrap())
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = Request::post(path).body(Body::from(body.to_string())).unwrap();
        let (status, body) = self.request(request).await;
        (status, serde_json::from_str(&body).unwrap())
    }

    /// Delegates `delay_id` for alice.
    async fn delegate(&self, delay_id: &str, timeout: i64) -> (u16, Value) {
        let mut body = get_token(&self.homeserver.name(), "good", "alice");
        body["delay_id"] = json!(delay_id);
        body["delay_timeout"] = json!(timeout);
        self.post("/delegate_delayed_leave", &body).await
    }

    /// A webhook of the SFU about alice.
    async fn webhook(&self, event: &str, reason: &str) -> u16 {
        let number = {
            let mut webhooks = self.webhooks.lock().unwrap();
            *webhooks += 1;
            *webhooks
        };
        let identity = ParticipantIdentity::of_member(
            &format!("@alice:{}", self.homeserver.name()),
            "DEVICE",
            "member-1",
        );
        let body = json!({
            "event": event, "id": format!("EV_{number}"), "createdAt": "0",
            "room": {"name": RoomAlias::of_slot("!room:hs", "m.call#ROOM").as_str()},
            "participant": {"identity": identity.as_str(), "disconnectReason": reason},
        })
        .to_string();
        self.request(signed(&body, "devsecret", 60, "")).await.0
    }

    fn calls(&self) -> Vec<String> {
        let seen = self.homeserver.seen().into_iter();
        seen.filter(|s: &Seen| s.path.contains("/delayed_events/"))
            .map(|s| s.path.replace(UNSTABLE, ""))
            .collect()
    }

    /// Waits until there are `count` delayed-event calls.
    async fn called(&self, count: usize) -> Vec<String> {
        self.until(|| self.calls().len() >= count).await;
        self.calls()
    }

    /// Waits until the store has `count` jobs.
    async fn stored(&self, count: usize) {
        self.until(|| self.shelf.ids().len() == count).await;
    }

    async fn until(&self, ready: impl Fn() -> bool) {
        let wait = async {
            while !ready() {
                // Woken by the homeserver, or else looked at again: a store does not say when it was written.
                let _ = tokio::time::timeout(Duration::from_millis(20), self.called.notified()).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("in time");
    }
}

async fn start(settings: &Settings, floor: &Arc<Floor>, shelf: &Arc<Shelf>) -> Service {
    let config = DelegationConfig::new("test");
    let service = Service::with_store(settings.clone(), floor.clone(), shelf.clone(), config).unwrap();
    service.restore().await;
    service
}

/// A webhook with `body`, signed with `secret`, good for `seconds` from now; `scheme` comes before the token.
pub(crate) fn signed(body: &str, secret: &str, seconds: i64, scheme: &str) -> Request<Body> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
    let claims = json!({
        "iss": "devkey", "iat": now, "nbf": now, "exp": now + seconds,
        "sha256": STANDARD.encode(Sha256::digest(body.as_bytes())),
    });
    let token =
        jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))
            .unwrap();
    Request::post("/sfu_webhook")
        .header(header::AUTHORIZATION, format!("{scheme}{token}"))
        .header(header::CONTENT_TYPE, "application/webhook+json")
        .body(Body::from(body.to_owned()))
        .unwrap()
}

fn refusal((status, body): (u16, Value)) -> (u16, String) {
    (status, body["errcode"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_leave_is_kept_alive_and_sent_when_the_participant_goes() {
    let world = World::new().await;
    assert_eq!(world.delegate("syd_1", 8000).await, (200, json!({})));
    assert_eq!(world.shelf.ids(), ["syd_1"], "in the store before the answer");
    assert_eq!(world.webhook("participant_joined", "").await, 200);
    assert_eq!(world.called(1).await, ["syd_1/restart"]);
    world.until(|| world.service.delegation_stats().unwrap().restarts == 1).await;
    assert_eq!(world.webhook("participant_left", "SIGNAL_CLOSE").await, 200);
    assert_eq!(world.called(2).await, ["syd_1/restart", "syd_1/send"]);
    world.stored(0).await;
    let stats = world.service.delegation_stats().unwrap();
    let times = |lateness: Lateness| lateness.counts.iter().sum::<u64>();
    assert_eq!((times(stats.restart_lateness), times(stats.send_lateness)), (1, 1));
    let seen = world.homeserver.seen();
    let call = seen.iter().find(|s| s.path.ends_with("/send")).unwrap();
    assert_eq!(
        (call.method.clone(), call.headers["content-type"].to_str().unwrap()),
        (Method::POST, "application/json")
    );
    assert!(!call.headers.contains_key("authorization"));
}

#[tokio::test]
async fn token_requests_can_bring_their_leave_along() {
    let world = World::new().await;
    let name = world.homeserver.name();
    for (path, mut body) in
        [("/get_token", get_token(&name, "good", "alice")), ("/sfu/get", sfu_get(&name, "good"))]
    {
        body["delay_id"] = json!(format!("syd{}", path.replace('/', "_")));
        body["delay_timeout"] = json!(3_600_000);
        let (status, answer) = world.post(path, &body).await;
        assert_eq!((status, answer["jwt"].is_string()), (200, true), "{answer}");
    }
    let mut ids = world.shelf.ids();
    ids.sort();
    assert_eq!(ids, ["syd_get_token", "syd_sfu_get"]);
}

#[tokio::test]
async fn a_participant_that_is_there_already_needs_no_webhook() {
    let world = World::new().await;
    *world.floor.present.lock().unwrap() = Some(true);
    world.delegate("syd_1", 60_000).await;
    assert_eq!(world.called(1).await, ["syd_1/restart"]);
}

#[tokio::test]
async fn a_room_is_asked_about_all_its_participants_at_once() {
    let mut world = World::new().await;
    for n in 0..20 {
        let mut body = get_token(&world.homeserver.name(), "good", "alice");
        body["member"]["id"] = json!(format!("member-{n}"));
        body["delay_id"] = json!(format!("syd_{n}"));
        body["delay_timeout"] = json!(3_600_000);
        assert_eq!(world.post("/delegate_delayed_leave", &body).await.0, 200);
    }
    *world.floor.present.lock().unwrap() = Some(true);
    world.floor.rounds.lock().unwrap().clear();
    world.restart().await;
    world.called(20).await;
    let rounds = world.floor.rounds.lock().unwrap().clone();
    assert!(rounds.iter().sum::<usize>() >= 20 && rounds.len() < 20, "{rounds:?}");
}

#[tokio::test]
async fn whoever_never_connects_is_sent_away_in_time() {
    let world = World::new().await;
    *world.answer.lock().unwrap() = StatusCode::NOT_FOUND;
    world.delegate("syd_1", 500).await;
    assert_eq!(world.called(1).await, ["syd_1/send"]);
    world.stored(0).await;
    assert_eq!(world.calls().len(), 1, "404 means that it was sent already");
}

#[tokio::test]
async fn a_connection_that_fails_is_no_reason_to_call_the_homeserver() {
    let world = World::new().await;
    world.delegate("syd_1", 60_000).await;
    assert_eq!(world.webhook("participant_connection_aborted", "JOIN_FAILURE").await, 200);
    world.stored(0).await;
    assert_eq!(world.calls(), [] as [String; 0]);
}

#[tokio::test]
async fn an_event_that_the_homeserver_does_not_know_ends_the_job() {
    let world = World::new().await;
    *world.answer.lock().unwrap() = StatusCode::NOT_FOUND;
    world.delegate("syd_1", 60_000).await;
    world.webhook("participant_joined", "").await;
    world.stored(0).await;
    assert_eq!(world.calls(), ["syd_1/restart"]);
}

#[tokio::test]
async fn a_new_leave_replaces_the_one_before() {
    let world = World::new().await;
    world.delegate("syd_1", 60_000).await;
    world.delegate("syd_2", 60_000).await;
    assert_eq!(world.shelf.ids(), ["syd_2"]);
    world.webhook("participant_joined", "").await;
    world.webhook("participant_left", "CLIENT_INITIATED").await;
    world.stored(0).await;
    assert!(world.calls().iter().all(|call| call.starts_with("syd_2/")), "{:?}", world.calls());
}

#[tokio::test]
async fn a_service_that_dies_goes_on_where_it_was() {
    let mut world = World::new().await;
    world.delegate("syd_1", 60_000).await;
    world.webhook("participant_joined", "").await;
    world.called(1).await;
    world.restart().await;
    world.webhook("participant_joined", "").await;
    assert_eq!(world.called(2).await[1], "syd_1/restart");
    world.webhook("participant_left", "").await;
    world.stored(0).await;
    assert_eq!(world.calls().last().unwrap(), "syd_1/send");
}

#[tokio::test]
async fn the_stable_paths_are_used_where_they_are_announced_and_really_there() {
    let world = World::new().await;
    *world.stable.lock().unwrap() = (true, true);
    world.delegate("syd_1", 500).await;
    world.webhook("participant_joined", "").await;
    world.until(|| world.calls().iter().any(|call| call.starts_with(STABLE))).await;
    // The homeserver is replaced by one that knows the unstable paths alone: the job does not notice.
    *world.stable.lock().unwrap() = (false, true);
    let before = world.calls().len();
    world.until(|| world.calls()[before..].iter().any(|call| call == "syd_1/restart")).await;
    world.webhook("participant_left", "").await;
    world.stored(0).await;
    assert_eq!(world.calls().last().unwrap(), "syd_1/send");
}

#[tokio::test]
async fn an_access_token_goes_to_its_homeserver_with_delayed_event_calls_only() {
    let world = World::with(
        |settings| {
            let name = settings.cs_api_url_overrides.keys().next().unwrap().clone();
            settings.delayed_event_tokens =
                [(name, "hunter2".into()), ("other.org".into(), "hunter3".into())].into();
        },
        false,
    )
    .await;
    world.delegate("syd_1", 60_000).await;
    world.webhook("participant_joined", "").await;
    world.called(1).await;
    world.webhook("participant_left", "").await;
    world.called(2).await;
    world.until(|| world.homeserver.seen().iter().any(|s| s.path.ends_with("/versions"))).await;
    for seen in world.homeserver.seen() {
        let token = seen.headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
        let delayed = seen.path.contains("/delayed_events/");
        assert_eq!(token.as_deref(), delayed.then_some("Bearer hunter2"), "{}", seen.path);
    }
    assert!(!format!("{:?}", world.service).contains("hunter"));
}

#[tokio::test]
async fn a_store_that_is_out_of_order_fails_no_request() {
    let world = World::with(|_| {}, true).await;
    assert_eq!(world.delegate("syd_1", 60_000).await.0, 200);
    world.webhook("participant_joined", "").await;
    assert_eq!(world.called(1).await, ["syd_1/restart"]);
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_being_sent_and_leaves_the_rest_to_the_next() {
    let world = World::new().await;
    world.delegate("syd_1", 60_000).await;
    world.webhook("participant_joined", "").await;
    world.webhook("participant_left", "").await;
    let other = sfu_get(&world.homeserver.name(), "good");
    let mut other = other;
    other["delay_id"] = json!("syd_2");
    other["delay_timeout"] = json!(60_000);
    assert_eq!(world.post("/sfu/get", &other).await.0, 200);
    world.service.shutdown(DEADLINE).await;
    assert_eq!(world.calls().last().unwrap(), "syd_1/send");
    assert_eq!(world.shelf.ids(), ["syd_2"]);
    assert_eq!(refusal(world.delegate("syd_3", 60_000).await), (503, "M_UNKNOWN".into()));
    assert_eq!(world.webhook("participant_joined", "").await, 503, "LiveKit says it again later");
}

#[tokio::test]
async fn refusals_come_in_the_order_that_clients_know() {
    let world = World::new().await;
    let name = world.homeserver.name();
    let complete = {
        let mut body = get_token(&name, "good", "alice");
        body["delay_id"] = json!("syd_1");
        body["delay_timeout"] = json!(8000);
        body
    };
    let bad = (400, "M_BAD_JSON".to_owned());
    for (pointer, value, expected) in [
        ("/room_id", json!(1), (400, "M_NOT_JSON".to_owned())),
        ("/room_id", json!(""), bad.clone()),
        ("/member/id", json!(""), bad.clone()),
        ("/openid_token/access_token", json!(""), bad.clone()),
        ("/delay_id", json!(null), bad.clone()),
        ("/delay_timeout", json!(0), bad.clone()),
        ("/openid_token/access_token", json!("wrong"), (401, "M_UNAUTHORIZED".to_owned())),
        ("/member/claimed_user_id", json!("@bob:hs"), (401, "M_UNAUTHORIZED".to_owned())),
        ("/delay_id", json!(".."), bad.clone()),
        ("/delay_id", json!("."), bad.clone()),
        ("/delay_id", json!("syd\n1"), bad.clone()),
        ("/delay_id", json!("x".repeat(256)), bad.clone()),
        ("/delay_timeout", json!(i64::MAX), bad.clone()),
        ("/delay_timeout", json!(1), bad),
    ] {
        let mut body = complete.clone();
        *body.pointer_mut(pointer).unwrap() = value.clone();
        assert_eq!(
            refusal(world.post("/delegate_delayed_leave", &body).await),
            expected,
            "{pointer} {value}"
        );
    }
    assert_eq!(world.shelf.ids(), [] as [String; 0]);
    for (method, status) in [(Method::OPTIONS, 200), (Method::GET, 405), (Method::PUT, 405)] {
        let request =
            Request::builder().method(method).uri("/delegate_delayed_leave").body(Body::empty()).unwrap();
        assert_eq!(world.request(request).await, (status, String::new()));
    }
}

#[tokio::test]
async fn restricted_users_cannot_delegate() {
    let world = World::with(|s| s.full_access = FullAccess::Only([].into()), false).await;
    assert_eq!(refusal(world.delegate("syd_1", 8000).await), (403, "M_FORBIDDEN".into()));
    let mut body = get_token(&world.homeserver.name(), "good", "alice");
    body["delay_id"] = json!("syd_1");
    body["delay_timeout"] = json!(8000);
    assert_eq!(refusal(world.post("/get_token", &body).await), (400, "M_BAD_JSON".into()));
}

#[tokio::test]
async fn a_homeserver_whose_api_cannot_be_found_is_refused_before_anything_is_made() {
    let world = World::with(|s| s.cs_api_url_overrides.clear(), false).await;
    assert_eq!(refusal(world.delegate("syd_1", 8000).await), (400, "M_BAD_JSON".into()));
    assert_eq!(world.shelf.ids(), [] as [String; 0]);
    let asked: Vec<_> = world.homeserver.seen().into_iter().map(|s| s.path).collect();
    assert_eq!(asked.last().unwrap(), "/.well-known/matrix/client");
}

#[tokio::test]
async fn many_who_look_for_one_homeserver_ask_it_once() {
    let world = World::with(|s| s.cs_api_url_overrides.clear(), false).await;
    world.well_known.store(true, Ordering::Relaxed);
    let many = ["syd_1", "syd_2", "syd_3", "syd_4"].map(|id| world.delegate(id, 60_000));
    let [a, b, c, d] = many;
    let answers = tokio::join!(a, b, c, d);
    assert_eq!([answers.0.0, answers.1.0, answers.2.0, answers.3.0], [200; 4]);
    world.webhook("participant_joined", "").await;
    world.called(1).await;
    let asked = world.homeserver.seen().into_iter().filter(|s| s.path.starts_with("/.well-known/"));
    assert_eq!(asked.count(), 1);
}

#[tokio::test]
async fn webhooks_must_be_signed_whole_and_new() {
    let world = World::new().await;
    let body = json!({"event": "room_started"}).to_string();
    let status = async |request: Request<Body>| world.request(request).await.0;
    assert_eq!(status(signed(&body, "devsecret", 60, "")).await, 200);
    assert_eq!(status(signed(&body, "devsecret", 60, "Bearer ")).await, 200);
    assert_eq!(status(signed(&body, "devsecret", -30, "")).await, 200, "clocks may differ by a minute");
    assert_eq!(status(signed(&body, "wrong", 60, "")).await, 401);
    assert_eq!(status(signed(&body, "devsecret", -120, "")).await, 401);
    assert_eq!(status(signed(&body, "devsecret", 60, "Basic ")).await, 401);
    let mut other = signed(&body, "devsecret", 60, "");
    *other.body_mut() = Body::from("{}");
    assert_eq!(status(other).await, 401);
    assert_eq!(status(Request::post("/sfu_webhook").body(Body::from(body.clone())).unwrap()).await, 401);
    assert_eq!(status(signed("not JSON", "devsecret", 60, "")).await, 400);
    assert_eq!(
        status(signed(&json!({"event": "participant_left"}).to_string(), "devsecret", 60, "")).await,
        400
    );
    assert_eq!(status(signed(&"x".repeat(1 << 21), "devsecret", 60, "")).await, 413);
    let get = Request::get("/sfu_webhook").body(Body::empty()).unwrap();
    assert_eq!(status(get).await, 405);
}

#[tokio::test]
async fn a_webhook_played_back_has_no_effect() {
    let world = World::new().await;
    world.delegate("syd_1", 60_000).await;
    let identity =
        ParticipantIdentity::of_member(&format!("@alice:{}", world.homeserver.name()), "DEVICE", "member-1");
    let left = json!({
        "event": "participant_left", "room": {"name": RoomAlias::of_slot("!room:hs", "m.call#ROOM").as_str()},
        "participant": {"identity": identity.as_str(), "disconnectReason": "CLIENT_INITIATED"},
    })
    .to_string();
    let [first, second] = [60, 61].map(|seconds| {
        let request = signed(&left, "devsecret", seconds, "");
        request.headers()[header::AUTHORIZATION].clone()
    });
    let deliver = async |token: &HeaderValue| {
        let request = Request::post("/sfu_webhook").header(header::AUTHORIZATION, token);
        world.request(request.body(Body::from(left.clone())).unwrap()).await.0
    };
    assert_eq!(deliver(&first).await, 200);
    world.stored(0).await;
    world.delegate("syd_2", 60_000).await;
    world.webhook("participant_joined", "").await;
    world.called(2).await;
    assert_eq!(deliver(&first).await, 200);
    assert_eq!(world.shelf.ids(), ["syd_2"]);
    let stats = world.service.delegation_stats().unwrap();
    assert_eq!((stats.connected, stats.leaving), (1, 0));

    // Not every SFU gives its events ids and times: with a token of its own it has happened again.
    assert_eq!(deliver(&second).await, 200);
    world.stored(0).await;
    assert_eq!(world.calls(), ["syd_1/send", "syd_2/restart", "syd_2/send"]);
}

#[tokio::test]
async fn nothing_of_this_is_there_without_a_store() {
    let service = Service::new(settings(), Arc::new(Floor::default())).unwrap();
    let status = async |path: &str| {
        let request = Request::post(path).body(Body::from("{}")).unwrap();
        let answer: Response = service.router().oneshot(request).await.unwrap();
        answer.status().as_u16()
    };
    assert_eq!((status("/sfu_webhook").await, status("/delegate_delayed_leave").await), (404, 404));
    assert!(service.delegation_stats().is_none());
}
