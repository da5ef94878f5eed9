//! The HTTP surface: reads requests into the machine's terms and hands back its answers.

#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use aws_lc_rs::hmac;
use axum::{
    Router,
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Request, State as Extension},
    http::{HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    Shared,
    error::MatrixError,
    ids::Caller,
    lock,
    state::{Action, DelayedForm, Direction, MessagesQuery, Outgoing},
};

/// The largest request body that is read.
const LARGEST_BODY: usize = 1024 * 1024;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
/// The longest a `/sync` waits, whatever the client asks for.
const LONGEST_POLL: Duration = Duration::from_secs(60);
/// Events in one page of `/messages`.
const LONGEST_PAGE: usize = 1_000;

type Object = Map<String, Value>;
type App = Extension<Arc<Shared>>;
type Answer = Result<Reply, MatrixError>;

/// A JSON body with status 200.
struct Reply(Value);

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        json_response(StatusCode::OK, &self.0)
    }
}

impl IntoResponse for MatrixError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = json_response(status, &self.body);
        if let Some(after) = self.retry_after {
            let seconds = after.as_millis().div_ceil(1000);
            if let Ok(value) = HeaderValue::from_str(&seconds.to_string()) {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
        }
        response
    }
}

fn json_response(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// The path's segments, percent-decoded.
pub(super) fn segments(path: &str) -> Vec<String> {
    path.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect()
}

fn decoded(segment: &str) -> String {
    // The form decoder turns '+' into a space, which a path does not mean.
    let segment = segment.replace('+', "%2B").replace('&', "%26").replace('=', "%3D");
    url::form_urlencoded::parse(segment.as_bytes())
        .next()
        .map(|(name, _)| name.into_owned())
        .unwrap_or_default()
}

pub(super) fn router(shared: Arc<Shared>) -> Router {
    let v3 = Router::new()
        .route("/capabilities", get(capabilities))
        .route("/register", post(register))
        .route("/register/available", get(register_available))
        .route("/login", get(login_flows).post(login))
        .route("/logout", post(logout))
        .route("/logout/all", post(logout_all))
        .route("/account/whoami", get(whoami))
        .route("/sync", get(sync))
        .route("/user/{user}/filter", post(add_filter))
        .route("/user/{user}/filter/{id}", get(filter))
        .route("/user/{user}/account_data/{kind}", get(account_data).put(set_account_data))
        .route(
            "/user/{user}/rooms/{room}/account_data/{kind}",
            get(room_account_data).put(set_room_account_data),
        )
        .route("/user/{user}/openid/request_token", post(openid_token))
        .route("/profile/{user}", get(profile))
        .route("/profile/{user}/{field}", get(profile_field).put(set_profile_field))
        .route("/presence/{user}/status", put(accepted))
        .route("/pushrules/", get(push_rules))
        .route("/pushrules/global/", get(push_rules_global))
        .route("/voip/turnServer", get(turn_servers))
        .route("/thirdparty/protocols", get(accepted))
        .route("/createRoom", post(create_room))
        .route("/join/{room}", post(join))
        .route("/joined_rooms", get(joined_rooms))
        .route("/directory/room/{alias}", get(alias))
        .route("/rooms/{room}/join", post(join))
        .route("/rooms/{room}/forget", post(forget))
        .route("/rooms/{room}/{verb}", post(change_membership))
        .route("/rooms/{room}/state", get(full_state))
        .route("/rooms/{room}/state/{kind}", get(state_event_bare).put(put_state_bare))
        .route("/rooms/{room}/state/{kind}/", get(state_event_bare).put(put_state_bare))
        .route("/rooms/{room}/state/{kind}/{key}", get(state_event).put(put_state))
        .route("/rooms/{room}/send/{kind}/{txn}", put(send))
        .route("/rooms/{room}/redact/{event}/{txn}", put(redact))
        .route("/rooms/{room}/members", get(members))
        .route("/rooms/{room}/joined_members", get(joined_members))
        .route("/rooms/{room}/messages", get(messages))
        .route("/rooms/{room}/event/{event}", get(room_event))
        .route("/rooms/{room}/context/{event}", get(context))
        .route("/rooms/{room}/typing/{user}", put(accepted_in_room))
        .route("/rooms/{room}/receipt/{kind}/{event}", post(accepted_in_room))
        .route("/rooms/{room}/read_markers", post(accepted_in_room))
        .route("/keys/upload", post(upload_keys))
        .route("/keys/query", post(query_keys))
        .route("/keys/claim", post(claim_keys))
        .route("/keys/changes", get(key_changes))
        .route("/keys/device_signing/upload", post(upload_cross_signing))
        .route("/keys/signatures/upload", post(upload_signatures))
        .route("/room_keys/version", get(no_backup))
        .route("/devices", get(devices))
        .route("/devices/{device}", get(device).put(rename_device).delete(delete_device))
        .route("/delete_devices", post(delete_devices))
        .route("/sendToDevice/{kind}/{txn}", put(send_to_device));
    let delayed = Router::new()
        .route("/", get(delayed_events))
        .route("/{id}", get(delayed_event).post(manage_delayed))
        .route("/{id}/{action}", post(manage_delayed_by_path));
    let dedicated = "/rooms/{room}/delayed_event/{kind}/{txn}";
    Router::new()
        .route("/_matrix/client/versions", get(versions))
        .route("/.well-known/matrix/client", get(well_known_client))
        .route("/.well-known/matrix/server", get(well_known_server))
        .route("/_matrix/federation/v1/openid/userinfo", get(openid_userinfo))
        .route("/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", get(rtc_transports))
        .nest("/_matrix/client/unstable/org.matrix.msc4140/delayed_events", delayed)
        .route(&format!("/_matrix/client/unstable/org.matrix.msc4140{dedicated}"), put(schedule_unstable))
        .route(&format!("/_matrix/client/v3{dedicated}"), put(schedule_stable))
        .route("/_matrix/client/v1/delayed_events/{id}/{action}", post(manage_delayed_stable))
        .nest("/_matrix/client/v3", v3)
        .fallback(async || MatrixError::unrecognized(404))
        .method_not_allowed_fallback(async || MatrixError::unrecognized(405))
        .with_state(shared)
}

// ---- what requests carry ----

impl FromRequestParts<Arc<Shared>> for Caller {
    type Rejection = MatrixError;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, MatrixError> {
        let Params(query) = Params::of(parts);
        let bearer = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = match bearer {
            Some(value) => value.strip_prefix("Bearer ").map(str::trim),
            None => query.get("access_token").map(String::as_str),
        };
        let token = token.ok_or_else(MatrixError::missing_token)?;
        shared.with(|state, _| state.caller(token))
    }
}

/// The query. The first of several values with one name counts; unknown names do not matter.
struct Params(HashMap<String, String>);

impl Params {
    fn of(parts: &Parts) -> Self {
        let mut params = HashMap::new();
        for (name, value) in url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()) {
            params.entry(name.into_owned()).or_insert_with(|| value.into_owned());
        }
        Self(params)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn is_set(&self, name: &str) -> bool {
        self.text(name) == Some("true")
    }

    fn number(&self, name: &str) -> Result<Option<u64>, MatrixError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse::<i64>() {
            Ok(number) => u64::try_from(number).map(Some).map_err(|_| {
                MatrixError::invalid_param(format!("Query parameter {name} must be a positive integer."))
            }),
            Err(_) => Err(MatrixError::invalid_param(format!("Query parameter {name} must be an integer"))),
        }
    }

    fn duration(&self, name: &str) -> Result<Option<Duration>, MatrixError> {
        Ok(self.number(name)?.map(Duration::from_millis))
    }
}

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = MatrixError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MatrixError> {
        Ok(Self::of(parts))
    }
}

/// Path parameters, percent-decoded.
struct P<T>(T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for P<T> {
    type Rejection = MatrixError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, MatrixError> {
        let path = Path::<T>::from_request_parts(parts, state).await;
        path.map(|Path(value)| Self(value))
            .map_err(|_| MatrixError::invalid_param("The path is not valid UTF-8"))
    }
}

/// A body that must be a JSON object.
struct Json(Object);

impl<S: Send + Sync> FromRequest<S> for Json {
    type Rejection = MatrixError;

    async fn from_request(request: Request, _: &S) -> Result<Self, MatrixError> {
        parse(&body(request.into_body()).await?).map(Self)
    }
}

/// As [`Json`], for endpoints where no body at all means `{}`.
struct JsonOrNothing(Object);

impl<S: Send + Sync> FromRequest<S> for JsonOrNothing {
    type Rejection = MatrixError;

    async fn from_request(request: Request, _: &S) -> Result<Self, MatrixError> {
        let body = body(request.into_body()).await?;
        if body.is_empty() { Ok(Self(Object::new())) } else { parse(&body).map(Self) }
    }
}

async fn body(body: Body) -> Result<bytes::Bytes, MatrixError> {
    match timeout(BODY_PATIENCE, axum::body::to_bytes(body, LARGEST_BODY)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => {
            Err(MatrixError::too_large(format!("The body is incomplete or exceeds {LARGEST_BODY} bytes")))
        }
        Err(_) => Err(MatrixError::new(408, "M_UNKNOWN", "The body took too long to arrive")),
    }
}

fn parse(body: &[u8]) -> Result<Object, MatrixError> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(MatrixError::bad_json("Content must be a JSON object.")),
        Err(_) => Err(MatrixError::new(400, "M_NOT_JSON", "Content not JSON.")),
    }
}

// ---- the server itself ----

async fn versions(Extension(app): App) -> Reply {
    let is_stable = app.with(|state, _| state.delayed_form() == DelayedForm::Stable);
    Reply(json!({
        "versions": ["r0.6.1", "v1.1", "v1.2", "v1.3", "v1.4", "v1.5", "v1.6", "v1.7", "v1.8", "v1.9",
            "v1.10", "v1.11", "v1.12", "v1.13", "v1.14", "v1.15"],
        "unstable_features": {
            "org.matrix.e2e_cross_signing": true,
            "org.matrix.msc4140": true,
            "org.matrix.msc4140.stable": is_stable,
            "org.matrix.msc4143": true,
            "org.matrix.msc4354": true,
        },
    }))
}

async fn well_known_client(Extension(app): App) -> Reply {
    Reply(json!({"m.homeserver": {"base_url": app.url}}))
}

async fn well_known_server(Extension(app): App) -> Reply {
    Reply(json!({"m.server": app.server_name}))
}

async fn capabilities(Extension(app): App, _: Caller) -> Reply {
    Reply(app.with(|state, _| state.capabilities()))
}

async fn rtc_transports(Extension(app): App, _: Caller) -> Reply {
    Reply(json!({"rtc_transports": *lock(&app.rtc_transports)}))
}

async fn turn_servers(Extension(app): App, who: Caller) -> Reply {
    app.turn_requests.fetch_add(1, Ordering::Relaxed);
    let Some(turn) = lock(&app.turn).clone() else { return Reply(json!({})) };
    let expires = app.clock.now().0 / 1000 + turn.ttl.as_secs();
    let username = format!("{expires}:{}", who.user);
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, turn.secret.as_bytes());
    let password = STANDARD.encode(hmac::sign(&key, username.as_bytes()));
    Reply(json!({
        "uris": turn.uris, "username": username, "password": password, "ttl": turn.ttl.as_secs(),
    }))
}

async fn accepted(_: Caller) -> Reply {
    Reply(json!({}))
}

async fn accepted_in_room(Extension(app): App, who: Caller, P(path): P<HashMap<String, String>>) -> Answer {
    let room = path.get("room").map_or("", String::as_str);
    app.with(|state, _| state.require_joined(&who, room)).map(Reply)
}

async fn push_rules(_: Caller) -> Reply {
    Reply(super::state::push_rules())
}

async fn push_rules_global(_: Caller) -> Reply {
    Reply(super::state::push_rules()["global"].take())
}

async fn no_backup(_: Caller) -> Answer {
    Err(MatrixError::not_found("No backup found"))
}

// ---- accounts ----

async fn register(Extension(app): App, params: Params, JsonOrNothing(body): JsonOrNothing) -> Answer {
    if params.text("kind") == Some("guest") {
        return Err(MatrixError::new(403, "M_GUEST_ACCESS_FORBIDDEN", "Guest access is disabled"));
    }
    app.with(|state, now| state.register(now, &body)).map(Reply)
}

async fn register_available(Extension(app): App, params: Params) -> Answer {
    let name = params.text("username").ok_or_else(|| MatrixError::missing_param("username"))?;
    app.with(|state, _| state.username_available(name)).map(Reply)
}

async fn login_flows() -> Reply {
    Reply(json!({"flows": [{"type": "m.login.password"}]}))
}

async fn login(Extension(app): App, Json(body): Json) -> Answer {
    app.with(|state, now| state.login(now, &body)).map(Reply)
}

async fn logout(Extension(app): App, who: Caller) -> Answer {
    app.with(|state, _| state.logout(&who, false)).map(Reply)
}

async fn logout_all(Extension(app): App, who: Caller) -> Answer {
    app.with(|state, _| state.logout(&who, true)).map(Reply)
}

async fn whoami(who: Caller) -> Reply {
    Reply(json!({"user_id": who.user, "device_id": who.device, "is_guest": false}))
}

async fn profile(Extension(app): App, P(user): P<String>) -> Answer {
    app.with(|state, _| state.profile(&user)).map(Reply)
}

async fn profile_field(Extension(app): App, P((user, field)): P<(String, String)>) -> Answer {
    app.with(|state, _| state.profile_field(&user, &field)).map(Reply)
}

async fn set_profile_field(
    Extension(app): App,
    who: Caller,
    P((user, field)): P<(String, String)>,
    Json(body): Json,
) -> Answer {
    app.with(|state, now| state.set_profile_field(now, &who, &user, &field, &body)).map(Reply)
}

async fn account_data(Extension(app): App, who: Caller, P((user, kind)): P<(String, String)>) -> Answer {
    app.with(|state, _| state.account_data(&who, &user, None, &kind)).map(Reply)
}

async fn set_account_data(
    Extension(app): App,
    who: Caller,
    P((user, kind)): P<(String, String)>,
    Json(body): Json,
) -> Answer {
    app.with(|state, _| state.set_account_data(&who, &user, None, &kind, body)).map(Reply)
}

async fn room_account_data(
    Extension(app): App,
    who: Caller,
    P((user, room, kind)): P<(String, String, String)>,
) -> Answer {
    app.with(|state, _| state.account_data(&who, &user, Some(&room), &kind)).map(Reply)
}

async fn set_room_account_data(
    Extension(app): App,
    who: Caller,
    P((user, room, kind)): P<(String, String, String)>,
    Json(body): Json,
) -> Answer {
    app.with(|state, _| state.set_account_data(&who, &user, Some(&room), &kind, body)).map(Reply)
}

async fn add_filter(Extension(app): App, who: Caller, P(user): P<String>, Json(body): Json) -> Answer {
    app.with(|state, _| state.add_filter(&who, &user, body)).map(Reply)
}

async fn filter(Extension(app): App, who: Caller, P((user, id)): P<(String, String)>) -> Answer {
    if *who.user != *user {
        return Err(MatrixError::forbidden("Cannot get filters for other users"));
    }
    app.with(|state, _| state.filter(&user, &id).map(|filter| Reply(filter.clone().into())))
}

async fn openid_token(
    Extension(app): App,
    who: Caller,
    P(user): P<String>,
    JsonOrNothing(_): JsonOrNothing,
) -> Answer {
    app.with(|state, now| state.openid_token(now, &who, &user)).map(Reply)
}

async fn openid_userinfo(Extension(app): App, params: Params) -> Answer {
    app.with(|state, now| state.openid_userinfo(now, params.text("access_token"))).map(Reply)
}

// ---- sync ----

async fn sync(Extension(app): App, who: Caller, params: Params) -> Answer {
    let patience = params.duration("timeout")?.unwrap_or_default().min(LONGEST_POLL);
    let deadline = Instant::now() + patience;
    let (since, filter) = (params.text("since"), params.text("filter"));
    let full_state = params.is_set("full_state");
    let state_after = params.is_set("org.matrix.msc4222.use_state_after");
    let request =
        app.with(|state, _| state.read_sync_request(&who, since, filter, full_state, state_after))?;
    let waits = since.is_some() && !full_state && !patience.is_zero();
    let waiter = app.waiter(&who.user);
    loop {
        // Listen first, look then: news between the two must not be missed.
        let mut news = std::pin::pin!(waiter.notified());
        news.as_mut().enable();
        let answer = app.with(|state, now| state.sync(now, &who, &request))?;
        if !waits || !answer.is_empty || timeout_at(deadline, news).await.is_err() {
            return Ok(Reply(answer.body));
        }
    }
}

// ---- rooms ----

async fn create_room(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    app.with(|state, now| state.create_room(now, &who, &body)).map(Reply)
}

async fn join(
    Extension(app): App,
    who: Caller,
    P(room): P<String>,
    JsonOrNothing(body): JsonOrNothing,
) -> Answer {
    app.with(|state, now| state.join(now, &who, &room, &body)).map(Reply)
}

async fn joined_rooms(Extension(app): App, who: Caller) -> Answer {
    app.with(|state, _| state.joined_rooms(&who)).map(Reply)
}

async fn alias(Extension(app): App, P(alias): P<String>) -> Answer {
    app.with(|state, _| state.alias(&alias)).map(Reply)
}

async fn change_membership(
    Extension(app): App,
    who: Caller,
    P((room, verb)): P<(String, String)>,
    JsonOrNothing(body): JsonOrNothing,
) -> Answer {
    if !["invite", "leave", "kick", "ban", "unban"].contains(&verb.as_str()) {
        return Err(MatrixError::unrecognized(404));
    }
    app.with(|state, now| state.change_membership(now, &who, &room, &verb, &body)).map(Reply)
}

async fn forget(Extension(app): App, who: Caller, P(room): P<String>) -> Answer {
    app.with(|state, _| state.forget(&who, &room)).map(Reply)
}

async fn full_state(Extension(app): App, who: Caller, P(room): P<String>) -> Answer {
    app.with(|state, now| state.full_state(now, &who, &room)).map(Reply)
}

async fn state_event_bare(
    app: App,
    who: Caller,
    P((room, kind)): P<(String, String)>,
    params: Params,
) -> Answer {
    state_event(app, who, P((room, kind, String::new())), params).await
}

async fn state_event(
    Extension(app): App,
    who: Caller,
    P((room, kind, key)): P<(String, String, String)>,
    params: Params,
) -> Answer {
    let whole = params.text("format") == Some("event");
    app.with(|state, now| state.state_event(now, &who, (&room, &kind, &key), whole)).map(Reply)
}

async fn put_state_bare(
    app: App,
    who: Caller,
    P((room, kind)): P<(String, String)>,
    params: Params,
    body: Json,
) -> Answer {
    put_state(app, who, P((room, kind, String::new())), params, body).await
}

async fn put_state(
    Extension(app): App,
    who: Caller,
    P((room, kind, key)): P<(String, String, String)>,
    params: Params,
    Json(content): Json,
) -> Answer {
    let event = Outgoing {
        room,
        kind,
        state_key: Some(key),
        txn: None,
        content,
        redacts: None,
        delay: delay_parameter(&app, &params)?,
        sticky: params.duration("org.matrix.msc4354.sticky_duration_ms")?,
    };
    app.with(|state, now| state.send(now, &who, event)).map(Reply)
}

async fn send(
    Extension(app): App,
    who: Caller,
    P((room, kind, txn)): P<(String, String, String)>,
    params: Params,
    Json(content): Json,
) -> Answer {
    let event = Outgoing {
        room,
        kind,
        state_key: None,
        txn: Some(txn),
        content,
        redacts: None,
        delay: delay_parameter(&app, &params)?,
        sticky: params.duration("org.matrix.msc4354.sticky_duration_ms")?,
    };
    app.with(|state, now| state.send(now, &who, event)).map(Reply)
}

/// Ignored, as any unknown parameter, where the dedicated endpoint has replaced it.
fn delay_parameter(app: &Shared, params: &Params) -> Result<Option<Duration>, MatrixError> {
    match app.with(|state, _| state.delayed_form()) {
        DelayedForm::QueryParameter => params.duration("org.matrix.msc4140.delay"),
        DelayedForm::Unstable | DelayedForm::Stable => Ok(None),
    }
}

async fn redact(
    Extension(app): App,
    who: Caller,
    P(path): P<(String, String, String)>,
    JsonOrNothing(content): JsonOrNothing,
) -> Answer {
    app.with(|state, now| state.redact(now, &who, path, content)).map(Reply)
}

async fn members(Extension(app): App, who: Caller, P(room): P<String>, params: Params) -> Answer {
    let which = (params.text("membership"), params.text("not_membership"));
    app.with(|state, now| state.members(now, &who, &room, which)).map(Reply)
}

async fn joined_members(Extension(app): App, who: Caller, P(room): P<String>) -> Answer {
    app.with(|state, _| state.joined_members(&who, &room)).map(Reply)
}

async fn messages(Extension(app): App, who: Caller, P(room): P<String>, params: Params) -> Answer {
    let query = MessagesQuery {
        direction: match params.text("dir") {
            Some("b") => Direction::Backwards,
            Some("f") => Direction::Forwards,
            Some(_) => return Err(MatrixError::invalid_param("'dir' must be 'b' or 'f'")),
            None => return Err(MatrixError::missing_param("dir")),
        },
        from: params.text("from").map(str::to_owned),
        limit: page_limit(&params)?,
    };
    app.with(|state, now| state.messages(now, &who, &room, &query)).map(Reply)
}

async fn room_event(Extension(app): App, who: Caller, P((room, event)): P<(String, String)>) -> Answer {
    app.with(|state, now| state.room_event(now, &who, &room, &event)).map(Reply)
}

async fn context(
    Extension(app): App,
    who: Caller,
    P((room, event)): P<(String, String)>,
    params: Params,
) -> Answer {
    let limit = page_limit(&params)?;
    app.with(|state, now| state.context(now, &who, (&room, &event), limit)).map(Reply)
}

fn page_limit(params: &Params) -> Result<usize, MatrixError> {
    let limit = params.number("limit")?.unwrap_or(10);
    Ok(usize::try_from(limit).unwrap_or(LONGEST_PAGE).clamp(1, LONGEST_PAGE))
}

// ---- delayed events ----

async fn schedule_unstable(
    Extension(app): App,
    who: Caller,
    P(path): P<(String, String, String)>,
    params: Params,
    Json(body): Json,
) -> Answer {
    match app.with(|state, _| state.delayed_form()) {
        DelayedForm::QueryParameter => Err(MatrixError::unrecognized(404)),
        DelayedForm::Unstable | DelayedForm::Stable => schedule(&app, &who, path, &params, body),
    }
}

async fn schedule_stable(
    Extension(app): App,
    who: Caller,
    P(path): P<(String, String, String)>,
    params: Params,
    Json(body): Json,
) -> Answer {
    match app.with(|state, _| state.delayed_form()) {
        DelayedForm::Stable => schedule(&app, &who, path, &params, body),
        DelayedForm::QueryParameter | DelayedForm::Unstable => Err(MatrixError::unrecognized(404)),
    }
}

fn schedule(
    app: &Shared,
    who: &Caller,
    (room, kind, txn): (String, String, String),
    params: &Params,
    mut body: Object,
) -> Answer {
    let delay =
        body.get("delay_ms").and_then(Value::as_u64).ok_or_else(|| MatrixError::missing_param("delay_ms"))?;
    let Some(Value::Object(content)) = body.remove("content") else {
        return Err(MatrixError::missing_param("content"));
    };
    let event = Outgoing {
        room,
        kind,
        state_key: body.get("state_key").and_then(Value::as_str).map(str::to_owned),
        txn: Some(txn),
        content,
        redacts: None,
        delay: Some(Duration::from_millis(delay)),
        sticky: params.duration("org.matrix.msc4354.sticky_duration_ms")?,
    };
    app.with(|state, now| state.send(now, who, event)).map(Reply)
}

async fn manage_delayed_stable(
    Extension(app): App,
    _: Caller,
    P((id, action)): P<(String, String)>,
) -> Answer {
    if app.with(|state, _| state.delayed_form()) != DelayedForm::Stable {
        return Err(MatrixError::unrecognized(404));
    }
    let action = Action::parse(&action).ok_or_else(|| MatrixError::unrecognized(404))?;
    app.with(|state, now| state.manage_delayed(now, &id, action)).map(Reply)
}

async fn delayed_events(Extension(app): App, who: Caller) -> Answer {
    app.with(|state, _| state.delayed_events(&who)).map(Reply)
}

async fn delayed_event(Extension(app): App, who: Caller, P(id): P<String>) -> Answer {
    app.with(|state, _| state.delayed_event(&who, &id)).map(Reply)
}

async fn manage_delayed(Extension(app): App, P(id): P<String>, Json(body): Json) -> Answer {
    let action = body.get("action").ok_or_else(|| MatrixError::missing_param("action"))?;
    let action = action
        .as_str()
        .and_then(Action::parse)
        .ok_or_else(|| MatrixError::invalid_param("'action' is not one of 'cancel', 'restart', 'send'"))?;
    app.with(|state, now| state.manage_delayed(now, &id, action)).map(Reply)
}

async fn manage_delayed_by_path(Extension(app): App, P((id, action)): P<(String, String)>) -> Answer {
    let action = Action::parse(&action).ok_or_else(|| MatrixError::unrecognized(404))?;
    app.with(|state, now| state.manage_delayed(now, &id, action)).map(Reply)
}

// ---- encryption and devices ----

async fn upload_keys(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    app.with(|state, _| state.upload_keys(&who, &body)).map(Reply)
}

async fn query_keys(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    app.with(|state, _| state.query_keys(&who, &body)).map(Reply)
}

async fn claim_keys(Extension(app): App, _: Caller, Json(body): Json) -> Answer {
    app.with(|state, _| state.claim_keys(&body)).map(Reply)
}

async fn key_changes(Extension(app): App, who: Caller, params: Params) -> Answer {
    app.with(|state, _| state.key_changes(&who, params.text("from"))).map(Reply)
}

async fn upload_cross_signing(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    app.with(|state, _| state.upload_cross_signing(&who, &body)).map(Reply)
}

async fn upload_signatures(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    app.with(|state, _| state.upload_signatures(&who, &body)).map(Reply)
}

async fn devices(Extension(app): App, who: Caller) -> Answer {
    app.with(|state, _| state.devices(&who)).map(Reply)
}

async fn device(Extension(app): App, who: Caller, P(id): P<String>) -> Answer {
    app.with(|state, _| state.device(&who, &id)).map(Reply)
}

async fn rename_device(Extension(app): App, who: Caller, P(id): P<String>, Json(body): Json) -> Answer {
    app.with(|state, _| state.rename_device(&who, &id, &body)).map(Reply)
}

async fn delete_device(
    Extension(app): App,
    who: Caller,
    P(id): P<String>,
    JsonOrNothing(body): JsonOrNothing,
) -> Answer {
    app.with(|state, _| state.delete_devices(&who, &[&id], &body)).map(Reply)
}

async fn delete_devices(Extension(app): App, who: Caller, Json(body): Json) -> Answer {
    let ids =
        body.get("devices").and_then(Value::as_array).ok_or_else(|| MatrixError::missing_param("devices"))?;
    let ids: Vec<&str> = ids.iter().filter_map(Value::as_str).collect();
    app.with(|state, _| state.delete_devices(&who, &ids, &body)).map(Reply)
}

async fn send_to_device(
    Extension(app): App,
    who: Caller,
    P((kind, txn)): P<(String, String)>,
    Json(body): Json,
) -> Answer {
    let mut dropped = |recipient: &str| app.faults.drops(&kind, recipient);
    app.with(|state, _| state.send_to_device(&who, &kind, &txn, &body, &mut dropped)).map(Reply)
}
