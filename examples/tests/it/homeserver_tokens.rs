//! Calls as merged MSC4143 and MSC4195 have them, on a real Synapse: sticky memberships, and the homeserver's own
//! endpoints for tokens and delayed leaves, which our authorisation service offers in Synapse's name.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use antiphon_call_sdk::{CallEvent, CallOptions, LiveKitFocus, MembershipMode, Transport};
use antiphon_focus::{Config, Focus};
use antiphon_jwt_service::{
    DelegationConfig, FullAccess, HomeserverSide, Service, Settings, TwirpSfu, store::MemoryStore,
};
use antiphon_testkit::peers::{Peer, Synapse, SynapseOptions, require};
use axum::{
    Json, Router,
    body::to_bytes,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::any,
};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{create_call_room, event, log_in, play_into, turn};

const LIMIT: Duration = Duration::from_secs(60);
const TOKEN: &str = "application-service-token";
const MOST: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_the_merged_form_hear_each_other_with_tokens_of_the_homeserver() {
    require!(Peer::Synapse);
    let _turn = turn().await;
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let sfu = focus.ws_url().to_owned();
    let options = SynapseOptions::default().and_application_service(TOKEN);
    let synapse = Synapse::start(options).await.unwrap();
    for user in ["alice", "bob"] {
        synapse.register(user, "pw").await.unwrap();
    }
    let service = service(&synapse, &sfu).await;
    let homeserver = format!("http://{}", in_front_of(&synapse, service.router(), &sfu).await);

    let (alice, bob) = (log_in(&homeserver, "alice").await, log_in(&homeserver, "bob").await);
    let room = create_call_room(&alice).await;
    bob.enter_room((&*room).into()).await.unwrap();
    let options = CallOptions::default().with_mode(MembershipMode::Matrix2Merged).with_delegate_leave(true);
    let (alices, mut alice_hears) = alice.join_call(&room, options.clone()).await.unwrap();
    let _playing = play_into(&alices, "alice").await;
    let delegated = |event: &CallEvent| matches!(event, CallEvent::LeaveDelegated);
    event(&mut alice_hears, "delegation to the homeserver", LIMIT, delegated).await;

    let (bobs, mut bob_hears) = bob.join_call(&room, options).await.unwrap();
    let _playing = play_into(&bobs, "bob").await;
    event(&mut bob_hears, "delegation to the homeserver", LIMIT, delegated).await;
    for (events, what) in [(&mut alice_hears, "bob's media"), (&mut bob_hears, "alice's media")] {
        event(events, what, LIMIT, |event| matches!(event, CallEvent::Frame { .. })).await;
    }
    let transports = &bobs.members()[0].transports;
    let foci: Vec<_> = transports.iter().filter_map(Transport::livekit).collect();
    let expected = LiveKitFocus { service: None, sfu: Some(sfu.parse().unwrap()) };
    assert_eq!(foci, [&expected], "no authorisation service is known, so only the homeserver gave tokens");
    let kept = service.delegation_stats().unwrap();
    assert_eq!(kept.waiting + kept.connected, 2, "both leaves are with the homeserver: {kept:?}");
    bobs.leave().await;
    alices.leave().await;
    focus.shutdown().await;
}

/// Our authorisation service, on the homeserver's side of Synapse, for the focus.
async fn service(synapse: &Synapse, sfu: &str) -> Service {
    let name = synapse.server_name().parse().unwrap();
    let mut homeserver = HomeserverSide::new(name, synapse.url().parse().unwrap());
    homeserver.application_service_token = Some(TOKEN.into());
    let mut settings = Settings::new(sfu, "devkey", "secret");
    settings.full_access = FullAccess::All;
    settings.homeserver = Some(homeserver);
    let rooms = Arc::new(TwirpSfu::new(sfu, "devkey", &"secret".into()).unwrap());
    let store = Arc::new(MemoryStore::default());
    let service = Service::with_store(settings, rooms, store, DelegationConfig::new("here")).unwrap();
    service.restore().await;
    service
}

/// The reverse proxy of such a deployment: the endpoints of MSC4195 to our service, all others to Synapse, whose
/// transports are those of the merged form.
async fn in_front_of(synapse: &Synapse, service: Router, sfu: &str) -> SocketAddr {
    let transports = json!({ "rtc_transports": [{ "type": "m.livekit", "url": sfu }] });
    let listed = any(|| async move { Json(transports) });
    let synapse = Arc::new((Client::builder().no_proxy().build().unwrap(), synapse.url().to_owned()));
    let router = Router::new()
        .route("/_matrix/client/v1/rtc/transports", listed.clone())
        .route("/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", listed)
        .fallback(to_synapse)
        .with_state(synapse);
    let router = Router::new().fallback(move |request: Request| {
        use tower::ServiceExt as _;
        let ours = request.uri().path().contains("/rtc/livekit/");
        let router = if ours { service.clone() } else { router.clone() };
        async move { router.oneshot(request).await }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn to_synapse(State(synapse): State<Arc<(Client, String)>>, request: Request) -> Response {
    let (http, url) = &*synapse;
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map(|path| path.as_str()).unwrap_or_default();
    let body = to_bytes(body, MOST).await.unwrap();
    let mut headers = parts.headers;
    headers.remove(header::HOST);
    let asked = http.request(parts.method, format!("{}{path}", url.trim_end_matches('/')));
    let Ok(answer) = asked.headers(headers).body(body).send().await else {
        return StatusCode::BAD_GATEWAY.into_response();
    };
    let status = answer.status();
    let kind = answer.headers().get(header::CONTENT_TYPE).cloned();
    let mut headers = HeaderMap::new();
    headers.extend(kind.map(|kind| (header::CONTENT_TYPE, kind)));
    let body = answer.bytes().await.unwrap_or_default();
    if let Ok(mut login @ Value::Object(_)) = serde_json::from_slice::<Value>(&body)
        && login["well_known"].take().is_object()
    {
        // Synapse sends clients to its own address, which in a deployment is that of the proxy.
        return (status, Json(login)).into_response();
    }
    (status, headers, body).into_response()
}
