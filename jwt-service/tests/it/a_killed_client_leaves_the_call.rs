//! Somebody's browser dies in a call, and the homeserver says so to the others as soon as the SFU has noticed:
//! with a real Synapse, plain and over TLS by an authority of its own, a real LiveKit server with webhooks,
//! unmodified `livekit-client` in Chromium, and the program in a process of its own that is killed as well.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_testkit::peers::{
    Browser, LiveKitJoin, LiveKitOptions, LiveKitPage, LiveKitServer, Peer, Session, Synapse, SynapseOptions,
    require,
};
use axum::{Json, Router, extract::State, routing::post};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle, time::Instant};

use crate::{
    child::{Log, Program},
    jobs_in_redis::Redis,
    support::DEADLINE,
};

const CALL_MEMBER: &str = "org.matrix.msc3401.call.member";
/// What only *send* explains if it happens sooner.
const LONG: Duration = Duration::from_mins(10);
/// What only restarts explain if it happens later.
const SHORT: Duration = Duration::from_secs(4);
/// The SFU waits about 20 s for a client that has gone silent.
const NOTICED: Duration = Duration::from_secs(60);
/// From the webhook to the leave in the room.
const PROMPT: Duration = Duration::from_secs(2);
/// From a service that is up again to the leave in the room, if it was down when the webhook came: it asks the
/// SFU twice, some seconds apart, before it believes that somebody is gone.
const BELATED: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_the_service_meanwhile() {
    require!(Peer::Synapse, Peer::LiveKit, Peer::Npm, Peer::Chromium, Peer::Redis, Peer::LoopbackOnly);
    let [mut plain, mut tls, mut file_up, mut file_down, mut file_deaf, mut redis_up, mut redis_down] =
        std::array::from_fn(|_| Program::new());
    // The SFU does not tell `file_deaf` anything.
    let told = [&plain, &tls, &file_up, &file_down, &redis_up, &redis_down];
    let (world, redis) = tokio::join!(World::new(&told), Redis::start(&[]));

    world.configure(&mut plain);
    plain.set("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING");
    let (name, url) = (world.synapse.server_name(), world.synapse.url());
    plain.set("LIVEKIT_CS_API_URL_OVERRIDES", format!("{name}={url}"));
    plain.start().await;
    for service in [&mut tls, &mut file_up, &mut file_down, &mut file_deaf, &mut redis_up, &mut redis_down] {
        world.configure(service);
        // Discovery leads to the TLS listener, and nothing else is trusted than its authority.
        let authority = service.file("authority.pem", world.synapse.authority_pem());
        service.set("SSL_CERT_FILE", authority);
    }
    tls.start().await;
    for service in [&mut file_up, &mut file_down, &mut file_deaf] {
        let state = service.path("state");
        service.set("LIVEKIT_JWT_STATE_DIR", state).start().await;
    }
    // Two databases: they are not replicas of each other.
    redis_up.set("LIVEKIT_REDIS_URL", redis.database(0)).start().await;
    redis_down.set("LIVEKIT_REDIS_URL", redis.database(1)).start().await;

    let brief = world.join(&plain, "brief", SHORT).await;
    let mut members = HashMap::new();
    for (service, name) in [
        (&plain, "plain"),
        (&tls, "tls"),
        (&file_up, "file_up"),
        (&file_down, "file_down"),
        (&file_deaf, "file_deaf"),
        (&redis_up, "redis_up"),
        (&redis_down, "redis_down"),
    ] {
        members.insert(name, world.join(service, name, LONG).await);
    }
    let mut since = HashMap::new();
    for member in members.values() {
        since.insert(member.name, world.restarted(member, member.scheduled).await);
    }

    // Killed with clients connected and their jobs alive: two are up again at once, and keep the jobs alive.
    for service in [&mut file_up, &mut file_down, &mut file_deaf, &mut redis_up, &mut redis_down] {
        service.kill().await;
    }
    for (service, name) in [(&mut file_up, "file_up"), (&mut redis_up, "redis_up")] {
        service.start().await;
        world.restarted(&members[name], since[name]).await;
    }
    // Several periods of the short delay have been outlived.
    let periods = 3 * u64::try_from(SHORT.as_millis()).unwrap();
    world.restarted(&brief, brief.scheduled + periods).await;
    members.insert("brief", brief);
    for member in members.values() {
        assert!(!member.watch.is_finished(), "{} left while it was there", member.name);
    }

    world.browser.kill().await.unwrap();
    for name in ["plain", "tls", "file_up", "redis_up", "brief"] {
        let member = members.remove(name).unwrap();
        let told = world.webhooks.left(&member).await;
        world.leaves(member, told, PROMPT).await;
    }
    // These are told by a webhook that does not reach them. LiveKit says it again after a second; the deaf one
    // finds out by itself.
    for (service, name) in
        [(&mut file_down, "file_down"), (&mut redis_down, "redis_down"), (&mut file_deaf, "file_deaf")]
    {
        let member = members.remove(name).unwrap();
        world.webhooks.left(&member).await;
        assert!(!member.watch.is_finished(), "{name}: nobody was there to send the leave");
        service.start().await;
        world.leaves(member, Instant::now(), BELATED).await;
    }
    for service in [&plain, &tls, &file_up, &file_down, &file_deaf, &redis_up, &redis_down] {
        service.until_no_job_is_left().await;
    }
    assert!(redis.entries().await.is_empty());
}

/// The peers of a deployment.
struct World {
    synapse: Synapse,
    livekit: LiveKitServer,
    browser: Browser,
    webhooks: Arc<Webhooks>,
    http: reqwest::Client,
}

/// Somebody in a call.
struct Member {
    name: &'static str,
    session: Session,
    delay_id: String,
    /// When the homeserver began to count the delay, by its clock in milliseconds.
    scheduled: u64,
    /// Ends when the leave is in the room, and says when that was.
    watch: JoinHandle<Instant>,
    page: LiveKitPage,
    /// Its service's.
    log: Log,
}

impl World {
    async fn new(services: &[&Program]) -> Self {
        let webhooks = Arc::new(Webhooks::default());
        let mut options = LiveKitOptions::default().webhook(webhooks.clone().listen().await);
        for service in services {
            options = options.webhook(service.url("/sfu_webhook"));
        }
        let (synapse, livekit, browser) = tokio::join!(
            Synapse::start(SynapseOptions::default().clients_over_tls()),
            LiveKitServer::start(options),
            Browser::start(),
        );
        let (synapse, livekit, browser) = (synapse.unwrap(), livekit.unwrap(), browser.unwrap());
        let http = reqwest::Client::builder().no_proxy().timeout(2 * DEADLINE).build().unwrap();
        Self { synapse, livekit, browser, webhooks, http }
    }

    fn configure(&self, service: &mut Program) {
        service
            .set("LIVEKIT_URL", self.livekit.url())
            .set("LIVEKIT_KEY", self.livekit.key())
            .set("LIVEKIT_SECRET", self.livekit.secret())
            .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", self.synapse.server_name());
    }

    /// Does what a client does: enters a call of its own by state, schedules its leave, delegates that to
    /// `service`, and joins the SFU.
    async fn join(&self, service: &Program, name: &'static str, delay: Duration) -> Member {
        let session = self.synapse.register(name, "pw").await.unwrap();
        let room = self.synapse.create_call_room(&session).await.unwrap();
        let (user, device) = (session.user_id.as_str(), session.device_id.as_str());
        let state_key = format!("_{user}_{device}_m.call");
        let state = self.at(&["_matrix", "client", "v3", "rooms", &room, "state", CALL_MEMBER, &state_key]);
        let content = json!({"application": "m.call", "call_id": "", "device_id": device});
        self.ask(&session, self.http.put(state.clone()).json(&content)).await;
        let watch = self.watch(&session, &room, &state_key).await;
        let milliseconds = u64::try_from(delay.as_millis()).unwrap();
        let mut delayed = state;
        delayed.query_pairs_mut().append_pair("org.matrix.msc4140.delay", &milliseconds.to_string());
        let answer = self.ask(&session, self.http.put(delayed).json(&json!({}))).await;
        let delay_id = answer["delay_id"].as_str().unwrap().to_owned();
        let scheduled = self.running_since(&session, &delay_id).await.unwrap();
        let page = self.page(service, &session, &room, &delay_id, milliseconds).await;
        Member { name, session, delay_id, scheduled, watch, page, log: service.log() }
    }

    async fn page(
        &self,
        service: &Program,
        session: &Session,
        room: &str,
        delay_id: &str,
        delay_timeout: u64,
    ) -> LiveKitPage {
        let path = ["_matrix", "client", "v3", "user", &session.user_id, "openid", "request_token"];
        let openid_token = self.ask(session, self.http.post(self.at(&path)).json(&json!({}))).await;
        let request = json!({
            "room_id": room, "slot_id": "m.call#ROOM", "openid_token": openid_token,
            "member": {
                "id": "member", "claimed_user_id": session.user_id, "claimed_device_id": session.device_id,
            },
            "delay_id": delay_id, "delay_timeout": delay_timeout,
        });
        let answer = self.http.post(service.url("/get_token")).json(&request).send().await.unwrap();
        let (status, answer) = (answer.status(), answer.json::<Value>().await.unwrap());
        assert_eq!(status, 200, "{answer}\n{}", service.log().tail());
        let text = |name: &str| answer[name].as_str().unwrap().to_owned();
        let (url, token) = (text("url"), text("jwt"));
        let join = LiveKitJoin { url, token, keys: None, publish: false, simulcast: false };
        self.browser.livekit_page(join).await.unwrap()
    }

    /// When the homeserver began to count the delay, by its clock in milliseconds; `None` if the event is no longer
    /// scheduled.
    async fn running_since(&self, session: &Session, delay_id: &str) -> Option<u64> {
        let path = ["_matrix", "client", "unstable", "org.matrix.msc4140", "delayed_events"];
        let answer = self.ask(session, self.http.get(self.at(&path))).await;
        let events = answer["delayed_events"].as_array().unwrap();
        let event = events.iter().find(|event| event["delay_id"] == delay_id)?;
        Some(event["running_since"].as_u64().unwrap())
    }

    /// Waits until the homeserver has been made to count anew, later than `since` of its clock; says when.
    async fn restarted(&self, member: &Member, since: u64) -> u64 {
        let restarted = async {
            loop {
                let running = self.running_since(&member.session, &member.delay_id).await;
                let running = running.unwrap_or_else(|| panic!("{} left while it was there", member.name));
                if running > since {
                    return running;
                }
                // The homeserver does not say when it happens; it can only be asked.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let restarted = tokio::time::timeout(DEADLINE, restarted).await;
        restarted.unwrap_or_else(|_| panic!("the leave of {} is not kept alive", member.name))
    }

    /// Waits for the leave in the room, at `limit` after `from`.
    async fn leaves(&self, member: Member, from: Instant, limit: Duration) {
        match tokio::time::timeout_at(from + limit, member.watch).await {
            Ok(at) => {
                let after = at.unwrap().duration_since(from);
                println!("{}: left after {after:?}", member.name);
                // It may have been in the room when we began to wait.
                assert!(after <= limit, "{} left after {after:?}", member.name);
            }
            Err(_) => panic!("{} has not left after {limit:?}:\n{}", member.name, member.log.tail()),
        }
    }

    /// Looks out for the leave in the room, as the others in it do.
    async fn watch(&self, session: &Session, room: &str, state_key: &str) -> JoinHandle<Instant> {
        let filter = json!({"room": {"rooms": [room]}, "presence": {"types": []}}).to_string();
        let mut sync = self.at(&["_matrix", "client", "v3", "sync"]);
        sync.query_pairs_mut().append_pair("filter", &filter);
        let first = self.ask(session, self.http.get(sync.clone())).await;
        let mut since = first["next_batch"].as_str().unwrap().to_owned();
        sync.query_pairs_mut().append_pair("timeout", "30000");
        let (http, token) = (self.http.clone(), session.access_token.clone());
        let (room, state_key) = (room.to_owned(), state_key.to_owned());
        tokio::spawn(async move {
            loop {
                let mut next = sync.clone();
                next.query_pairs_mut().append_pair("since", &since);
                // It ends with the homeserver, when the test is over.
                let Ok(answer) = http.get(next).bearer_auth(&token).send().await else {
                    return std::future::pending().await;
                };
                let answer: Value = answer.json().await.unwrap();
                let events = &answer["rooms"]["join"][&room]["timeline"]["events"];
                let leave = |event: &Value| {
                    event["type"] == CALL_MEMBER
                        && event["state_key"] == state_key.as_str()
                        && event["content"] == json!({})
                };
                if events.as_array().is_some_and(|events| events.iter().any(leave)) {
                    return Instant::now();
                }
                since = answer["next_batch"].as_str().unwrap().to_owned();
            }
        })
    }

    fn at(&self, path: &[&str]) -> url::Url {
        let mut url: url::Url = self.synapse.url().parse().unwrap();
        url.path_segments_mut().unwrap().extend(path);
        url
    }

    async fn ask(&self, session: &Session, request: reqwest::RequestBuilder) -> Value {
        let answer = request.bearer_auth(&session.access_token).send().await.unwrap();
        let (status, body) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{status} {body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// The SFU tells this test what it tells the services, each by a connection of its own: a service that is down
/// is really not reached, and we still know when it would have been.
#[derive(Default)]
struct Webhooks {
    left: Mutex<HashMap<String, Instant>>,
    changed: Notify,
}

impl Webhooks {
    /// Where the SFU reaches it.
    async fn listen(self: Arc<Self>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(post(Self::receive)).with_state(self);
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    async fn receive(State(webhooks): State<Arc<Self>>, body: axum::body::Bytes) -> Json<Value> {
        let event: Value = serde_json::from_slice(&body).unwrap();
        let identity = event["participant"]["identity"].as_str().unwrap_or_default();
        if matches!(event["event"].as_str(), Some("participant_left" | "participant_connection_aborted")) {
            webhooks.left.lock().unwrap().entry(identity.to_owned()).or_insert_with(Instant::now);
            webhooks.changed.notify_waiters();
        }
        Json(json!({}))
    }

    /// When the SFU has told that the member is gone.
    async fn left(&self, member: &Member) -> Instant {
        let told = async {
            loop {
                let changed = self.changed.notified();
                if let Some(at) = self.left.lock().unwrap().get(&member.page.identity) {
                    return *at;
                }
                changed.await;
            }
        };
        tokio::time::timeout(NOTICED, told).await.expect("the SFU notices")
    }
}
