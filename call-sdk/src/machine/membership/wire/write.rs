//! Our own membership as an event: every form that we write.

use std::time::Duration;

use ruma_common::{DeviceId, OwnedRoomId, UserId};
use serde_json::{Value, json};

use super::{STATE_TYPE, STICKY_TYPE};
use crate::{
    matrix::{EventTarget, EventWrite},
    member::{Device, MemberId, MembershipForm, ParticipantIdentity, Slot},
    time::UnixMillis,
    transport::{LiveKitFocus, MeshSession, mesh},
};

/// How long our sticky events stay: the longest that MSC4354 allows. Join, update and leave use the same duration, as
/// the event that expires last wins.
pub(crate) const STICKY_DURATION: Duration = Duration::from_secs(3600);

/// The largest integer that canonical JSON allows: 2^53 - 1.
const MAX_INTEGER: u64 = (1 << 53) - 1;

/// The membership form that we write. All forms are read in every mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MembershipMode {
    /// A state event, each member on its own focus: every deployed client reads it. The default.
    #[default]
    Compatibility,
    /// A sticky event whose transport has both URLs, for readers of every sticky generation.
    Matrix2,
    /// A sticky event as merged MSC4143 and MSC4195 have it: `m.livekit`, tokens from the homeserver. Where only the
    /// authorisation service issues tokens, the event is that of [`Self::Matrix2`].
    Matrix2Merged,
    /// A state event with `oldest_membership`: everybody publishes to the focus of the oldest member. For clients of
    /// before 2026.
    Legacy,
}

impl MembershipMode {
    /// The event form of this mode.
    #[must_use]
    pub fn form(self) -> MembershipForm {
        match self {
            Self::Compatibility | Self::Legacy => MembershipForm::State,
            Self::Matrix2 | Self::Matrix2Merged => MembershipForm::Sticky,
        }
    }
}

/// Where our media travels. With neither, nobody hears us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OwnTransports {
    /// The focus that we publish on.
    pub focus: Option<LiveKitFocus>,
    /// Our session in the mesh, if we can mesh.
    pub mesh: Option<MeshSession>,
}

/// What our membership says about us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnDescription {
    /// Our device.
    pub device: Device,
    /// The room of the call.
    pub room_id: OwnedRoomId,
    /// Its version: state keys depend on it.
    pub room_version: String,
    /// The slot.
    pub slot: Slot,
    /// The form that is written.
    pub mode: MembershipMode,
    /// Our membership's own id: random per join in the sticky form, `{user}:{device}` in the state form.
    pub member_id: MemberId,
    /// Where our media travels.
    pub transports: OwnTransports,
    /// `audio`, `video` or another; `None` leaves it out.
    pub intent: Option<String>,
}

impl OwnDescription {
    /// The identity under which others look for us, by the event that we write. The token for publishing must be one
    /// that grants this identity.
    #[must_use]
    pub(crate) fn identity(&self) -> ParticipantIdentity {
        let Device { user_id, device_id } = &self.device;
        match self.mode.form() {
            MembershipForm::State => ParticipantIdentity::of_device(user_id, device_id),
            MembershipForm::Sticky if self.publishes_merged_type() => {
                ParticipantIdentity::of_member(user_id, &self.member_id)
            }
            MembershipForm::Sticky => {
                ParticipantIdentity::of_claimed_device(user_id, device_id, &self.member_id)
            }
        }
    }

    /// Whether our transport entry has the type `m.livekit`. That type needs the SFU's URL, and `livekit` needs the
    /// authorisation service: where only one is known, it decides instead of the mode.
    fn publishes_merged_type(&self) -> bool {
        match &self.transports.focus {
            Some(LiveKitFocus { service: Some(_), sfu: Some(_) }) => {
                self.mode == MembershipMode::Matrix2Merged
            }
            Some(focus) => focus.service.is_none(),
            None => false,
        }
    }
}

/// Why a sticky membership ends (MSC4143 §Leaving).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LeaveCode {
    /// We left.
    Leave,
    /// We stopped restarting it, so the homeserver sent it.
    DelayedLeave,
    /// The slot was closed.
    SlotClosed,
}

impl LeaveCode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Leave => "leave",
            Self::DelayedLeave => "delayed_leave",
            Self::SlotClosed => "slot_closed",
        }
    }
}

/// The event of our membership.
///
/// State form: `created` is left out of the first event of a membership and is in every later one; `expires` counts
/// from `created`. The sticky form has neither.
#[must_use]
pub(crate) fn membership(own: &OwnDescription, expires: Duration, created: Option<UnixMillis>) -> EventWrite {
    match own.mode.form() {
        MembershipForm::State => state(own, state_content(own, expires, created)),
        MembershipForm::Sticky => EventWrite {
            event_type: STICKY_TYPE.to_owned(),
            target: EventTarget::Message { sticky: Some(STICKY_DURATION) },
            content: sticky_content(own),
        },
    }
}

/// The event that ends our membership. A delayed leave is never encrypted, as the homeserver sends it later.
#[must_use]
pub(crate) fn leave(own: &OwnDescription, code: LeaveCode) -> EventWrite {
    if own.mode.form() == MembershipForm::State {
        return state(own, json!({}));
    }
    let sticky = Some(STICKY_DURATION);
    EventWrite {
        event_type: STICKY_TYPE.to_owned(),
        target: match code {
            LeaveCode::DelayedLeave => EventTarget::ClearMessage { sticky },
            LeaveCode::Leave | LeaveCode::SlotClosed => EventTarget::Message { sticky },
        },
        // Without `application`: all deployed readers treat such content as a leave.
        content: json!({
            "slot_id": own.slot.slot_id(),
            "member": { "id": own.member_id, "membership": "leave" },
            "leave_reason": { "code": code.as_str() },
            "sticky_key": own.member_id,
            "msc4354_sticky_key": own.member_id,
        }),
    }
}

/// The state key of our membership: `_{user}_{device}_{application}{call id}`. The leading underscore is dropped only
/// in rooms of MSC3757 and MSC3779, where a key may begin with its owner's user id.
#[must_use]
pub(crate) fn state_key(user: &UserId, device: &DeviceId, slot: &Slot, room_version: &str) -> String {
    let is_owned = ["org.matrix.msc3757", "org.matrix.msc3779"].iter().any(|prefix| {
        room_version.strip_prefix(prefix).is_some_and(|rest| {
            !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') // a word boundary
        })
    });
    let underscore = if is_owned { "" } else { "_" };
    format!("{underscore}{user}_{device}_{}{}", slot.application, slot.call_id())
}

fn state(own: &OwnDescription, content: Value) -> EventWrite {
    let Device { user_id, device_id } = &own.device;
    let key = state_key(user_id, device_id, &own.slot, &own.room_version);
    EventWrite { event_type: STATE_TYPE.to_owned(), target: EventTarget::State { key }, content }
}

fn state_content(own: &OwnDescription, expires: Duration, created: Option<UnixMillis>) -> Value {
    let selection = if own.mode == MembershipMode::Legacy { "oldest_membership" } else { "multi_sfu" };
    let service = own.transports.focus.iter().filter_map(|focus| focus.service.as_ref());
    let foci = service.map(|service| {
        json!({ "type": "livekit", "livekit_service_url": service.as_str(), "livekit_alias": own.room_id })
    });
    // Deployed readers take the first entry alone, so the focus comes first.
    let foci = foci.chain(own.transports.mesh.as_ref().map(mesh_entry));
    let mut content = json!({
        "application": own.slot.application,
        "call_id": own.slot.call_id(),
        "scope": "m.room",
        "device_id": own.device.device_id,
        "membershipID": own.member_id,
        "expires": u64::try_from(expires.as_millis()).unwrap_or(MAX_INTEGER).min(MAX_INTEGER),
        "focus_active": { "type": "livekit", "focus_selection": selection },
        "foci_preferred": foci.collect::<Vec<_>>(),
    });
    if let Some(created) = created {
        content["created_ts"] = json!(created.0);
    }
    if let Some(intent) = &own.intent {
        content["m.call.intent"] = json!(intent);
    }
    content
}

/// A superset that validators of every sticky generation accept.
fn sticky_content(own: &OwnDescription) -> Value {
    let kind = if own.publishes_merged_type() { "m.livekit" } else { "livekit" };
    let focus = own.transports.focus.as_ref().map(|focus| {
        let mut transport = json!({ "type": kind });
        if let Some(service) = &focus.service {
            transport["livekit_service_url"] = json!(service.as_str());
        }
        if let Some(sfu) = &focus.sfu {
            transport["url"] = json!(sfu.as_str());
        }
        transport
    });
    let mesh = own.transports.mesh.as_ref().map(mesh_entry);
    let mut can_subscribe = vec!["m.livekit", "livekit"];
    can_subscribe.extend(mesh.as_ref().map(|_| mesh::TRANSPORT_TYPE));
    let transports: Vec<_> = focus.into_iter().chain(mesh).collect();
    let mut application = json!({ "type": own.slot.application });
    if let Some(intent) = &own.intent {
        // `intent` is the name of MSC4196, `m.call.intent` the deployed one.
        application["intent"] = json!(intent);
        application["m.call.intent"] = json!(intent);
    }
    json!({
        "slot_id": own.slot.slot_id(),
        "application": application,
        "member": {
            "id": own.member_id,
            "membership": "join",
            "user_id": own.device.user_id,
            "device_id": own.device.device_id,
        },
        "transports": { "published": transports, "can_subscribe": can_subscribe },
        "rtc_transports": transports,
        "versions": [],
        "sticky_key": own.member_id,
        "msc4354_sticky_key": own.member_id,
    })
}

/// The entry of a member that can mesh (`docs/mesh.md`).
fn mesh_entry(session: &MeshSession) -> Value {
    json!({ "type": mesh::TRANSPORT_TYPE, "session_id": session.0 })
}
