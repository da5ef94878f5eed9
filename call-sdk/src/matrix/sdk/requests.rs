//! Every [`MatrixRequest`] as HTTP. One attempt each; whether to try again is the machine's decision.

use std::{sync::PoisonError, time::Duration};

use matrix_sdk::{config::RequestConfig, ruma::TransactionId};
use rand::Rng as _;
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use super::{Inner, events, http, http::Ask};
use crate::{
    matrix::{
        ApiVersion, DelayId, DelayedAction, DelayedEvent, EventTarget, EventWrite, Jwt, MatrixReply,
        MatrixRequest, OpenIdToken, RequestError, RtcTokenRequest, ScheduleForm, ServerSupport,
        TransportSource, TurnServers,
    },
    transport::LiveKitFocus,
};

const CLIENT: [&str; 2] = ["_matrix", "client"];
const DELAY_MSC: &str = "org.matrix.msc4140";
const TRANSPORTS_MSC: &str = "org.matrix.msc4143";
const TOKEN_MSC: &str = "io.element.msc4195";
/// The stable name alone is ignored by Synapse 1.163, so both are always sent.
const STICKY: [&str; 2] = ["sticky_duration_ms", "org.matrix.msc4354.sticky_duration_ms"];
const DELAY: &str = "org.matrix.msc4140.delay";
/// Transports that are looked at.
const MOST_TRANSPORTS: usize = 16;

/// An event ready to be sent: encrypted if it is to be.
struct Ready {
    event_type: String,
    state_key: Option<String>,
    content: Value,
    sticky: Option<Duration>,
}

impl Inner {
    pub(super) async fn perform(
        &self,
        request: MatrixRequest,
        limit: Duration,
    ) -> Result<MatrixReply, RequestError> {
        match request {
            MatrixRequest::ReadSupport => self.read_support(limit).await.map(MatrixReply::Support),
            MatrixRequest::Send(event) => self.send(event, limit).await,
            MatrixRequest::Schedule(event) => self.schedule(event, limit).await,
            MatrixRequest::ProbeDelayParameter => {
                self.probe_delay(limit).await.map(MatrixReply::DelayParameter)
            }
            MatrixRequest::UpdateDelayed { delay_id, action } => {
                self.update_delayed(&delay_id, action, limit).await
            }
            MatrixRequest::Redact { event_id, reason } => {
                let txn = TransactionId::new();
                let path = self.in_room(&["redact", event_id.as_str(), txn.as_str()]);
                let body = reason.map_or_else(|| json!({}), |reason| json!({"reason": reason}));
                let reply: EventReply = read(self.ask(Ask::put(&path, &body), limit).await?)?;
                reply.into_reply()
            }
            MatrixRequest::OpenIdToken => {
                let user = self.device.user_id.as_str();
                let path = client(&["v3", "user", user, "openid", "request_token"]);
                let reply: OpenIdReply = read(self.ask(Ask::post(&path, &json!({})), limit).await?)?;
                Ok(MatrixReply::OpenId(reply.into()))
            }
            MatrixRequest::Transports(source) => {
                self.transports(source, limit).await.map(MatrixReply::Transports)
            }
            MatrixRequest::TurnServers => {
                let path = client(&["v3", "voip", "turnServer"]);
                let reply: TurnReply = read(self.ask(Ask::get(&path), limit).await?)?;
                Ok(MatrixReply::Turn(reply.into()))
            }
            MatrixRequest::RtcToken(request) => {
                let path = rtc(request.version, "get_token");
                let reply: JwtReply =
                    read(self.ask(Ask::post(&path, &self.token_body(&request)), limit).await?)?;
                Ok(MatrixReply::Jwt(Jwt(reply.jwt)))
            }
            MatrixRequest::DelegateLeave { version, sfu, slot, member_id, delay_id } => {
                let body = json!({"url": sfu.as_str(), "room_id": self.room.room_id(), "slot_id": slot.slot_id(),
                    "member_id": member_id, "delay_id": delay_id.0});
                self.ask(Ask::post(&rtc(version, "delegate_delayed_leave"), &body), limit).await?;
                Ok(MatrixReply::Done)
            }
        }
    }

    fn known_support(&self) -> Option<ServerSupport> {
        self.support.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn read_support(&self, limit: Duration) -> Result<ServerSupport, RequestError> {
        let versions: Versions = read(self.ask(Ask::get(&client(&["versions"])), limit).await?)?;
        // A homeserver without capabilities names no limits.
        let capabilities = match self.ask(Ask::get(&client(&["v3", "capabilities"])), limit).await {
            Err(RequestError::Unsupported | RequestError::NotFound) => Value::Null,
            answer => answer?,
        };
        let support = versions.support(&capabilities);
        *self.support.lock().unwrap_or_else(PoisonError::into_inner) = Some(support.clone());
        Ok(support)
    }

    async fn send(&self, event: EventWrite, limit: Duration) -> Result<MatrixReply, RequestError> {
        if self.encryptor.is_none()
            && event.target == (EventTarget::Message { sticky: None })
            && self.is_to_be_encrypted(&event.event_type).await?
        {
            // Without stickiness matrix-sdk can do it, whatever client it is.
            let config = RequestConfig::new().disable_retry().timeout(limit);
            let sent = self.room.send_raw(&event.event_type, event.content).with_request_config(config).await;
            let event_id = sent.map_err(|error| http::sdk_error(&error))?.response.event_id;
            return Ok(MatrixReply::Sent { event_id });
        }
        let ready = self.ready(event).await?;
        let txn = TransactionId::new();
        let path = self.event_path(&ready, &txn);
        let reply: EventReply =
            read(self.ask(with_sticky(Ask::put(&path, &ready.content), &ready), limit).await?)?;
        reply.into_reply()
    }

    async fn schedule(&self, delayed: DelayedEvent, limit: Duration) -> Result<MatrixReply, RequestError> {
        let ready = self.ready(delayed.event).await?;
        let (room, txn) = (self.room.room_id().as_str(), TransactionId::new());
        let delay = millis(delayed.delay);
        let reply = match delayed.form {
            ScheduleForm::QueryParameter => {
                let path = self.event_path(&ready, &txn);
                let ask = Ask::put(&path, &ready.content).query(DELAY, delay.to_string());
                self.ask(with_sticky(ask, &ready), limit).await
            }
            ScheduleForm::Dedicated(version) => {
                let tail = ["rooms", room, "delayed_event", &ready.event_type, txn.as_str()];
                let path = match version {
                    ApiVersion::Stable => client(&["v3"]),
                    ApiVersion::Unstable => client(&["unstable", DELAY_MSC]),
                };
                let path = [&path[..], &tail].concat();
                let mut body = json!({"delay_ms": delay, "content": ready.content});
                if version == ApiVersion::Unstable {
                    // The name in earlier drafts, and in ruma.
                    body["delay"] = delay.into();
                }
                if let Some(key) = &ready.state_key {
                    body["state_key"] = key.as_str().into();
                }
                self.ask(with_sticky(Ask::put(&path, &body), &ready), limit).await.map_err(|error| {
                    // The text asks for a bare 403 where the delay is too long.
                    let max = self.known_support().and_then(|support| support.max_delay);
                    match (error, max) {
                        (RequestError::Forbidden { .. }, Some(max)) if delayed.delay > max => {
                            RequestError::MaxDelayExceeded { max: Some(max) }
                        }
                        (error, _) => error,
                    }
                })
            }
        };
        let reply: EventReply = read(reply?)?;
        reply.into_reply()
    }

    /// Whether the query parameter for delays works. The room does not exist, so nothing can be sent, whatever the
    /// homeserver makes of the request.
    async fn probe_delay(&self, limit: Duration) -> Result<bool, RequestError> {
        let letters: String =
            rand::rng().sample_iter(rand::distr::Alphanumeric).take(18).map(char::from).collect();
        let room = format!("!{letters}:{}", self.device.user_id.server_name());
        let txn = TransactionId::new();
        let path = client(&["v3", "rooms", &room, "send", events::STICKY_MEMBER[0], txn.as_str()]);
        match self.ask(Ask::put(&path, &json!({})).query(DELAY, "-1"), limit).await {
            Err(RequestError::Refused { errcode, .. }) => Ok(errcode == "M_INVALID_PARAM"),
            Ok(_)
            | Err(RequestError::Forbidden { .. } | RequestError::NotFound | RequestError::Unsupported) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn update_delayed(
        &self,
        delay_id: &DelayId,
        action: DelayedAction,
        limit: Duration,
    ) -> Result<MatrixReply, RequestError> {
        let action = match action {
            DelayedAction::Restart => "restart",
            DelayedAction::Cancel => "cancel",
            DelayedAction::Send => "send",
        };
        let stable =
            self.known_support().and_then(|support| support.delayed_events) == Some(ApiVersion::Stable);
        let prefix = if stable { client(&["v1"]) } else { client(&["unstable", DELAY_MSC]) };
        let path = [&prefix[..], &["delayed_events", &delay_id.0]].concat();
        let by_path = [&path[..], &[action]].concat();
        let mut answer = self.ask(Ask::post(&by_path, &json!({})), limit).await;
        if !stable && answer == Err(RequestError::Unsupported) {
            // Homeservers before summer 2026 take the action in the body only.
            answer = self.ask(Ask::post(&path, &json!({"action": action})), limit).await;
        }
        match answer {
            Ok(_) => Ok(MatrixReply::Done),
            Err(RequestError::Refused { status: 409, .. }) => Err(RequestError::AlreadyFinal),
            Err(error) => Err(error),
        }
    }

    async fn transports(
        &self,
        source: TransportSource,
        limit: Duration,
    ) -> Result<Vec<LiveKitFocus>, RequestError> {
        let listed = match source {
            TransportSource::Endpoint(ApiVersion::Stable) => {
                self.ask(Ask::get(&client(&["v1", "rtc", "transports"])), limit).await?
            }
            TransportSource::Endpoint(ApiVersion::Unstable) => {
                self.ask(Ask::get(&client(&["unstable", TRANSPORTS_MSC, "rtc", "transports"])), limit).await?
            }
            TransportSource::WellKnown => {
                http::get_public(&self.client(), self.well_known_url()?, limit).await?
            }
        };
        let entries = match source {
            TransportSource::Endpoint(_) => listed.get("transports").or_else(|| listed.get("rtc_transports")),
            TransportSource::WellKnown => listed.get("org.matrix.msc4143.rtc_foci"),
        };
        let entries = entries.and_then(Value::as_array).into_iter().flatten();
        Ok(entries.take(MOST_TRANSPORTS).filter_map(focus).collect())
    }

    /// The user's server, not the homeserver: only the former's administrator may speak for the user's domain. As plain
    /// as the homeserver's own URL.
    fn well_known_url(&self) -> Result<Url, RequestError> {
        let (client, server) = (self.client(), self.device.user_id.server_name());
        let base = match client.server() {
            Some(url) => url,
            None => Url::parse(&format!("{}://{server}", client.homeserver().scheme()))
                .map_err(|error| RequestError::Local { cause: format!("{server}: {error}") })?,
        };
        base.join("/.well-known/matrix/client")
            .map_err(|error| RequestError::Local { cause: error.to_string() })
    }

    fn token_body(&self, request: &RtcTokenRequest) -> Value {
        let mut body = json!({"url": request.sfu.as_str(), "room_id": self.room.room_id(),
            "slot_id": request.slot.slot_id()});
        if let Some(server) = &request.server {
            body["server_name"] = server.as_str().into();
        }
        if request.nested_member {
            body["member"] = json!({"id": request.member_id});
        } else {
            body["member_id"] = json!(request.member_id);
        }
        body
    }

    async fn ready(&self, event: EventWrite) -> Result<Ready, RequestError> {
        let EventWrite { event_type, target, content } = event;
        Ok(match target {
            EventTarget::State { key } => Ready { event_type, state_key: Some(key), content, sticky: None },
            EventTarget::ClearMessage { sticky } => Ready { event_type, state_key: None, content, sticky },
            EventTarget::Message { sticky } if !self.is_to_be_encrypted(&event_type).await? => {
                Ready { event_type, state_key: None, content, sticky }
            }
            EventTarget::Message { sticky } => {
                let Some(encryptor) = &self.encryptor else {
                    return Err(RequestError::Local {
                        cause: "matrix-sdk cannot send an encrypted event that is sticky or delayed for this client; \
                                take the room from a Session"
                            .to_owned(),
                    });
                };
                let content = encryptor.encrypt(&self.room, &event_type, &content).await?;
                Ready { event_type: events::ENCRYPTED.to_owned(), state_key: None, content, sticky }
            }
        })
    }

    /// An unknown state counts as encrypted: the mistake that leaks nothing. Reactions are never encrypted, as
    /// everywhere in Matrix: their relation must be readable by the homeserver.
    async fn is_to_be_encrypted(&self, event_type: &str) -> Result<bool, RequestError> {
        let state = self.room.latest_encryption_state().await.map_err(|error| http::sdk_error(&error))?;
        Ok(event_type != "m.reaction" && (state.is_encrypted() || state.is_unknown()))
    }

    fn in_room<'a>(&'a self, tail: &[&'a str]) -> Vec<&'a str> {
        [&client(&["v3", "rooms", self.room.room_id().as_str()])[..], tail].concat()
    }

    fn event_path<'a>(&'a self, event: &'a Ready, txn: &'a TransactionId) -> Vec<&'a str> {
        match &event.state_key {
            Some(key) => self.in_room(&["state", &event.event_type, key]),
            None => self.in_room(&["send", &event.event_type, txn.as_str()]),
        }
    }
}

fn client<'a>(tail: &[&'a str]) -> Vec<&'a str> {
    [&CLIENT[..], tail].concat()
}

fn rtc(version: ApiVersion, endpoint: &str) -> Vec<&str> {
    match version {
        ApiVersion::Stable => client(&["v1", "rtc", "livekit", endpoint]),
        ApiVersion::Unstable => client(&["unstable", TOKEN_MSC, "rtc", "livekit", endpoint]),
    }
}

fn with_sticky<'a>(ask: Ask<'a>, event: &Ready) -> Ask<'a> {
    let Some(duration) = event.sticky else { return ask };
    let duration = millis(duration).to_string();
    STICKY.into_iter().fold(ask, |ask, name| ask.query(name, duration.clone()))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn read<T: for<'de> Deserialize<'de>>(answer: Value) -> Result<T, RequestError> {
    serde_json::from_value(answer).map_err(|error| RequestError::Network {
        cause: format!("the homeserver's answer cannot be read: {error}"),
    })
}

/// One entry of a list of transports. Unknown types and unusable URLs are left out.
fn focus(entry: &Value) -> Option<LiveKitFocus> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str);
    if !matches!(text("type")?, "livekit" | "m.livekit") {
        return None;
    }
    let focus = LiveKitFocus {
        service: text("livekit_service_url").and_then(|url| url.parse().ok()),
        sfu: text("url").and_then(|url| url.parse().ok()),
    };
    (focus.service.is_some() || focus.sfu.is_some()).then_some(focus)
}

#[derive(Deserialize)]
struct Versions {
    #[serde(default)]
    unstable_features: serde_json::Map<String, Value>,
}

impl Versions {
    /// No specification version contains any of these yet, so only the flags count.
    fn support(&self, capabilities: &Value) -> ServerSupport {
        let flag = |name: &str| self.unstable_features.get(name).and_then(Value::as_bool) == Some(true);
        let by_flag = |name: &str| match (flag(&format!("{name}.stable")), flag(name)) {
            (true, _) => Some(ApiVersion::Stable),
            (false, true) => Some(ApiVersion::Unstable),
            (false, false) => None,
        };
        let limits = capabilities.get("capabilities").and_then(|all| {
            all.get("m.delayed_events").or_else(|| all.get("org.matrix.msc4140.delayed_events"))
        });
        let max_delay = limits.and_then(|limits| limits.get("max_delay_ms")).and_then(Value::as_u64);
        ServerSupport {
            delayed_events: by_flag(DELAY_MSC),
            max_delay: max_delay.map(Duration::from_millis),
            sticky_events: by_flag("org.matrix.msc4354").is_some(),
            transports: by_flag(TRANSPORTS_MSC),
        }
    }
}

#[derive(Deserialize)]
struct EventReply {
    event_id: Option<matrix_sdk::ruma::OwnedEventId>,
    delay_id: Option<String>,
}

impl EventReply {
    fn into_reply(self) -> Result<MatrixReply, RequestError> {
        match (self.delay_id, self.event_id) {
            (Some(delay_id), _) => Ok(MatrixReply::Scheduled { delay_id: DelayId(delay_id) }),
            (None, Some(event_id)) => Ok(MatrixReply::Sent { event_id }),
            (None, None) => Err(RequestError::Network {
                cause: "the homeserver answered with neither an event id nor a delay id".to_owned(),
            }),
        }
    }
}

#[derive(Deserialize)]
struct OpenIdReply {
    access_token: String,
    token_type: String,
    matrix_server_name: String,
    expires_in: u64,
}

impl From<OpenIdReply> for OpenIdToken {
    fn from(reply: OpenIdReply) -> Self {
        let OpenIdReply { access_token, token_type, matrix_server_name, expires_in } = reply;
        Self { access_token, token_type, matrix_server_name, expires_in }
    }
}

/// A homeserver without TURN servers answers `{}`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TurnReply {
    uris: Vec<String>,
    username: String,
    password: String,
    ttl: u64,
}

impl From<TurnReply> for TurnServers {
    fn from(reply: TurnReply) -> Self {
        let TurnReply { uris, username, password, ttl } = reply;
        Self { uris, username, password, ttl: Duration::from_secs(ttl) }
    }
}

#[derive(Deserialize)]
struct JwtReply {
    jwt: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn support(features: Value, capabilities: Value) -> ServerSupport {
        let versions: Versions = read(json!({"versions": ["v1.11"], "unstable_features": features})).unwrap();
        versions.support(&json!({"capabilities": capabilities}))
    }

    #[test]
    fn support_is_read_from_flags_and_capability() {
        let synapse =
            json!({"org.matrix.msc4140": true, "org.matrix.msc4354": true, "org.matrix.msc4143": false});
        let read =
            support(synapse, json!({"org.matrix.msc4140.delayed_events": {"max_delay_ms": 86_400_000}}));
        assert_eq!(read.delayed_events, Some(ApiVersion::Unstable));
        assert_eq!(read.max_delay, Some(Duration::from_secs(86_400)));
        assert!(read.sticky_events);
        assert_eq!(read.transports, None);
        let stable = json!({"org.matrix.msc4140": true, "org.matrix.msc4140.stable": true});
        let read = support(stable, json!({"m.delayed_events": {}}));
        assert_eq!((read.delayed_events, read.max_delay), (Some(ApiVersion::Stable), None));
        assert!(!read.sticky_events);
    }

    #[test]
    fn transport_entries_are_read_loosely() {
        let both = focus(
            &json!({"type": "m.livekit", "url": "wss://sfu.example", "livekit_service_url": "https://jwt.example", "x": 1}),
        );
        let both = both.unwrap();
        assert_eq!(both.sfu.unwrap().as_str(), "wss://sfu.example");
        assert_eq!(both.service.unwrap().as_str(), "https://jwt.example");
        let half = focus(
            &json!({"type": "livekit", "url": "nonsense", "livekit_service_url": "https://jwt.example"}),
        );
        assert_eq!(half, Some(LiveKitFocus::of_service("https://jwt.example".parse().unwrap())));
        for unusable in
            [json!({"type": "livekit"}), json!({"type": "other", "url": "wss://x"}), json!({}), json!(null)]
        {
            assert_eq!(focus(&unusable), None, "{unusable}");
        }
    }

    #[test]
    fn delay_id_wins_and_event_id_means_sent() {
        let reply = |answer| read::<EventReply>(answer).unwrap().into_reply();
        assert_eq!(
            reply(json!({"delay_id": "d", "event_id": "$e"})),
            Ok(MatrixReply::Scheduled { delay_id: DelayId("d".into()) })
        );
        assert!(matches!(reply(json!({"event_id": "$e"})), Ok(MatrixReply::Sent { .. })));
        assert!(matches!(reply(json!({})), Err(RequestError::Network { .. })));
    }

    #[test]
    fn no_turn_servers_reads_as_empty() {
        assert_eq!(TurnServers::from(read::<TurnReply>(json!({})).unwrap()), TurnServers::default());
    }
}
