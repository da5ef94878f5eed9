//! The `m.call.*` to-device messages (docs/mesh.md §Signalling).
//!
//! [`read`] checks that a message is for us and that its claims match the device that Olm vouches for. Every text and
//! list is bounded. A message with a wrong or oversized field is dropped as a whole.

use serde::Deserialize as _;
use serde_json::{Map, Value, json};

use super::{Candidate, Sdp, StreamMetadata, Streams, Us};
use crate::{member::Device, transport::MeshSession};

const INVITE: &str = "m.call.invite";
const ANSWER: &str = "m.call.answer";
const CANDIDATES: &str = "m.call.candidates";
const NEGOTIATE: &str = "m.call.negotiate";
const STREAMS: &str = "m.call.sdp_stream_metadata_changed";
const HANGUP: &str = "m.call.hangup";

const VERSION: &str = "1";
/// How long a client may ring for an invite, in milliseconds.
const LIFETIME: u64 = 60_000;
/// Ours: counts the invites of one session.
const CALL_NUMBER: &str = "dev.antiphon.call_number";

/// Longest description taken, in bytes.
pub(super) const MAX_SDP: usize = 64 * 1024;
/// Most candidates of one message.
pub(super) const MAX_CANDIDATES: usize = 128;
/// Most streams of one message.
pub(super) const MAX_STREAMS: usize = 64;
/// Longest identifier, in bytes.
const MAX_IDENTIFIER: usize = 255;
/// Longest candidate line, in bytes.
const MAX_CANDIDATE: usize = 1024;
/// Longest purpose of a stream, in bytes.
const MAX_PURPOSE: usize = 64;
/// Longest name of a track, in bytes.
const MAX_NAME: usize = 255;
/// Largest number that every JSON implementation keeps exact.
const MAX_NUMBER: u64 = (1 << 53) - 1;

/// Names one connection on the wire.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct CallId(pub(super) String);

/// A message that is for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The connection that it is about.
    pub(super) call: CallId,
    /// The sender's session.
    pub(super) session: MeshSession,
    /// Its number in its call and direction.
    pub(super) seq: u64,
    /// What it says.
    pub(super) body: Body,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// The first offer of a call.
    Invite {
        /// The offer.
        sdp: Sdp,
        /// The caller's streams.
        streams: Streams,
        /// Counts the invites of the caller's session. Other clients may not send it.
        number: Option<u64>,
    },
    /// The answer to the invite.
    Answer { sdp: Sdp, streams: Streams },
    /// Where the sender may be reached.
    Candidates(Vec<Candidate>),
    /// A later offer.
    Offer { sdp: Sdp, streams: Streams },
    /// The answer to a later offer.
    LaterAnswer { sdp: Sdp, streams: Streams },
    /// The sender's streams changed.
    Streams(Streams),
    /// The sender ended the call.
    Hangup(Reason),
    /// A message that has a number but no meaning here, for instance `m.call.select_answer`.
    Ignored,
}

/// Why a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The member left.
    UserHangup,
    /// A focus carries the pair.
    Moved,
    /// The sender sees no membership of the receiver any more.
    NoMembership,
    /// The receiver has another session.
    NewSession,
    /// Another call of the pair took its place.
    Replaced,
    /// No answer in time.
    InviteTimeout,
    /// No path in time.
    IceTimeout,
    /// The path was lost.
    IceFailed,
    /// A description could not be used; also any reason that is not known here.
    UnknownError,
}

impl Reason {
    pub(super) const ALL: [Self; 9] = [
        Self::UserHangup,
        Self::Moved,
        Self::NoMembership,
        Self::NewSession,
        Self::Replaced,
        Self::InviteTimeout,
        Self::IceTimeout,
        Self::IceFailed,
        Self::UnknownError,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::UserHangup => "user_hangup",
            Self::Moved => "moved",
            Self::NoMembership => "no_membership",
            Self::NewSession => "new_session",
            Self::Replaced => "replaced",
            Self::InviteTimeout => "invite_timeout",
            Self::IceTimeout => "ice_timeout",
            Self::IceFailed => "ice_failed",
            Self::UnknownError => "unknown_error",
        }
    }
}

/// The sender and the receiver of a message of ours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Envelope<'a> {
    /// The sender.
    pub(super) us: &'a Us,
    /// The receiving device.
    pub(super) to: &'a Device,
    /// The receiving session.
    pub(super) session: &'a MeshSession,
}

/// Reads a message to us from the device `from`; `None` if it is for another call or session, claims another device,
/// or has a wrong field.
pub(super) fn read(us: &Us, from: &Device, event_type: &str, content: &Value) -> Option<Message> {
    let content = content.as_object()?;
    let is = |key, expected: &str| content.get(key).and_then(Value::as_str) == Some(expected);
    let addressed = is("version", VERSION)
        && is("room_id", us.room_id.as_str())
        && is("conf_id", &us.slot.slot_id())
        && is("party_id", from.device_id.as_str())
        && is("device_id", from.device_id.as_str())
        && is("dest_session_id", &us.session.0);
    if !addressed {
        return None;
    }
    let call = CallId(text(content, "call_id", 1, MAX_IDENTIFIER)?);
    let session = MeshSession(text(content, "sender_session_id", 1, MAX_IDENTIFIER)?);
    let seq = number(content.get("seq")?)?;
    let body = match event_type {
        INVITE => {
            let invitee = content.get("invitee");
            if invitee.is_some_and(|invitee| invitee.as_str() != Some(us.device.user_id.as_str())) {
                return None;
            }
            let (offers, sdp) = description(content.get("offer")?)?;
            let number = match content.get(CALL_NUMBER) {
                Some(value) => Some(number(value)?),
                None => None,
            };
            offers.then_some(())?;
            Body::Invite { sdp, streams: streams(content)?, number }
        }
        ANSWER => {
            let (offers, sdp) = description(content.get("answer")?)?;
            (!offers).then_some(())?;
            Body::Answer { sdp, streams: streams(content)? }
        }
        NEGOTIATE => {
            let (offers, sdp) = description(content.get("description")?)?;
            let streams = streams(content)?;
            if offers { Body::Offer { sdp, streams } } else { Body::LaterAnswer { sdp, streams } }
        }
        CANDIDATES => Body::Candidates(candidates(content.get("candidates")?)?),
        STREAMS => {
            content.get("sdp_stream_metadata")?;
            Body::Streams(streams(content)?)
        }
        HANGUP => {
            let reason = content.get("reason").and_then(Value::as_str);
            let known = Reason::ALL.into_iter().find(|known| Some(known.as_str()) == reason);
            Body::Hangup(known.unwrap_or(Reason::UnknownError))
        }
        _ => Body::Ignored,
    };
    Some(Message { call, session, seq, body })
}

/// Writes a message: its type and its content.
pub(super) fn write(envelope: Envelope<'_>, call: &CallId, seq: u64, body: &Body) -> (&'static str, Value) {
    let Envelope { us, to, session } = envelope;
    let mut content = Map::new();
    let mut put = |key: &str, value: Value| content.insert(key.to_owned(), value);
    let event_type = match body {
        Body::Invite { sdp, streams, number } => {
            put("offer", json!({ "type": "offer", "sdp": sdp }));
            put("invitee", json!(to.user_id));
            put("lifetime", json!(LIFETIME));
            put("capabilities", capabilities());
            put("sdp_stream_metadata", json!(streams));
            if let Some(number) = number {
                put(CALL_NUMBER, json!(number));
            }
            INVITE
        }
        Body::Answer { sdp, streams } => {
            put("answer", json!({ "type": "answer", "sdp": sdp }));
            put("capabilities", capabilities());
            put("sdp_stream_metadata", json!(streams));
            ANSWER
        }
        Body::Offer { sdp, streams } => {
            put("description", json!({ "type": "offer", "sdp": sdp }));
            put("sdp_stream_metadata", json!(streams));
            NEGOTIATE
        }
        Body::LaterAnswer { sdp, streams } => {
            put("description", json!({ "type": "answer", "sdp": sdp }));
            put("sdp_stream_metadata", json!(streams));
            NEGOTIATE
        }
        Body::Candidates(candidates) => {
            put("candidates", json!(candidates));
            CANDIDATES
        }
        Body::Streams(streams) => {
            put("sdp_stream_metadata", json!(streams));
            STREAMS
        }
        Body::Hangup(reason) => {
            put("reason", json!(reason.as_str()));
            HANGUP
        }
        Body::Ignored => "m.call.select_answer",
    };
    put("version", json!(VERSION));
    put("room_id", json!(us.room_id));
    put("conf_id", json!(us.slot.slot_id()));
    put("call_id", json!(call.0));
    put("party_id", json!(us.device.device_id));
    put("device_id", json!(us.device.device_id));
    put("sender_session_id", json!(us.session.0));
    put("dest_session_id", json!(session.0));
    put("seq", json!(seq));
    (event_type, Value::Object(content))
}

fn capabilities() -> Value {
    json!({ "m.call.transferee": false, "m.call.dtmf": false })
}

fn text(content: &Map<String, Value>, key: &str, min: usize, max: usize) -> Option<String> {
    let text = content.get(key)?.as_str()?;
    (min..=max).contains(&text.len()).then(|| text.to_owned())
}

fn number(value: &Value) -> Option<u64> {
    value.as_u64().filter(|number| *number <= MAX_NUMBER)
}

/// Whether it is an offer, and its text.
fn description(value: &Value) -> Option<(bool, Sdp)> {
    let value = value.as_object()?;
    let offers = match value.get("type")?.as_str()? {
        "offer" => true,
        "answer" => false,
        _ => return None,
    };
    Some((offers, Sdp(text(value, "sdp", 1, MAX_SDP)?)))
}

fn candidates(value: &Value) -> Option<Vec<Candidate>> {
    let list = value.as_array().filter(|list| list.len() <= MAX_CANDIDATES)?;
    list.iter()
        .map(|value| {
            let candidate = Candidate::deserialize(value).ok()?;
            let mid_fits = candidate.mid.as_ref().is_none_or(|mid| mid.len() <= MAX_IDENTIFIER);
            (candidate.candidate.len() <= MAX_CANDIDATE && mid_fits).then_some(candidate)
        })
        .collect()
}

fn streams(content: &Map<String, Value>) -> Option<Streams> {
    let Some(value) = content.get("sdp_stream_metadata") else { return Some(Streams::new()) };
    let map = value.as_object().filter(|map| map.len() <= MAX_STREAMS)?;
    map.iter()
        .map(|(id, value)| {
            let metadata = StreamMetadata::deserialize(value).ok()?;
            let name = metadata.track.as_ref().map_or(0, |track| track.name.len());
            let fits = (1..=MAX_IDENTIFIER).contains(&id.len())
                && metadata.purpose.len() <= MAX_PURPOSE
                && name <= MAX_NAME;
            fits.then(|| (id.clone(), metadata))
        })
        .collect()
}
