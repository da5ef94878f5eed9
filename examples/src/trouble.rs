//! Events that say why somebody is not heard or seen, as a sentence.

use antiphon_call_sdk::{CallEvent, EndReason, MeshReason, NoMediaCause};

/// What goes wrong and whose fault it is; `None` for events that are not about trouble.
///
/// An application that shows these to its users saves them most questions.
#[must_use]
pub fn trouble(event: &CallEvent) -> Option<String> {
    Some(match event {
        CallEvent::PeerRefused { device, failure } => {
            format!("{device} is refused, so we neither hear it nor are heard by it: {failure}")
        }
        CallEvent::KeyRejected { sender, reason } => format!("a media key of {sender} is refused: {reason}"),
        CallEvent::KeyDeliveryFailed { device, failure } => {
            format!("our media key did not reach {device}; trying again: {failure}")
        }
        CallEvent::OwnDeviceNotTrusted(trust) => format!(
            "our own device is not trusted ({trust:?}), so most members will not hear us: sign it with the recovery key, \
             or verify it from another session"
        ),
        CallEvent::Undecryptable { member, reason, .. } => {
            format!("frames of {} do not decrypt: {reason}", member.user_id)
        }
        CallEvent::NoMedia { member, cause, .. } => {
            let cause = match cause {
                NoMediaCause::NothingArrives => "a track is announced and nothing arrives",
                NoMediaCause::NoKey => "frames arrive, but the member's key has not",
                NoMediaCause::NothingOpens => "frames arrive, but the member's key does not open them",
                _ => "the cause is unknown",
            };
            format!("no media of {} for 10 s: {cause}", member.user_id)
        }
        CallEvent::FocusFailed { focus, ours, failure } => {
            let role = if *ours { "our focus" } else { "the focus of another member" };
            format!("{role} {focus} cannot be used: {failure}")
        }
        CallEvent::MediaBlocked { focus, tried } => format!(
            "no media path to {focus}: UDP may be blocked, or it may advertise a wrong address (tried {})",
            if tried.is_empty() { "nothing".to_owned() } else { tried.join(", ") }
        ),
        CallEvent::MeshBegan(MeshReason::NoFocus) => {
            "neither the homeserver nor a member names a focus that we can use, so we send our media to each member \
             separately: every one more takes uplink"
                .to_owned()
        }
        CallEvent::MeshBegan(MeshReason::FocusUnreachable) => {
            "our focus is not reached, so we send our media to each member separately until it is back; members that \
             cannot do that do not hear us meanwhile"
                .to_owned()
        }
        CallEvent::PeerFailed { member, reason, failures } => {
            let advice = if *failures < 2 {
                ""
            } else {
                "; if it goes on, a network on the way lets no UDP through, or hides its addresses: a TURN server on \
                 the homeserver helps, or a focus"
            };
            format!("no direct connection to {} ({failures}. attempt), trying again: {reason}{advice}", member.user_id)
        }
        CallEvent::MeshTooLarge { member, bits_per_second, needed } => format!(
            "{} gets no video from us: the way there carries {} kbit/s and our smallest picture needs {}; send fewer \
             pixels, or use a focus, which takes everything once",
            member.user_id,
            bits_per_second / 1000,
            needed.div_ceil(1000),
        ),
        CallEvent::Reconnecting(focus) => format!("the connection to {focus} is lost; reconnecting"),
        CallEvent::UnknownParticipant { focus, identity } => {
            format!("{identity} is on {focus}, but is not a member of the call; it is never decrypted")
        }
        CallEvent::OtherCall { slot, members } => {
            format!("{members} members are in another call of this room ({})", slot.slot_id())
        }
        CallEvent::LocalTrackEnded { reason, .. } => format!("the SFU ended a track of ours: {reason}"),
        CallEvent::LeaveNotScheduled { reason, listed_for } => format!(
            "if this program dies, it stays listed in the call for {} min: {reason}",
            listed_for.as_secs().div_ceil(60)
        ),
        CallEvent::DelegationFailed(error) => format!("our leave is not delegated: {error}"),
        CallEvent::MembershipTrouble { doing, error } => {
            format!("the homeserver has trouble {doing}; trying again: {error}")
        }
        CallEvent::ProbablyLeft(true) => {
            "the homeserver has probably removed us from the call; rejoining".to_owned()
        }
        CallEvent::Ended(EndReason::Left | EndReason::Dropped) => return None,
        CallEvent::Ended(reason) => format!("the call ended: {reason}"),
        _ => return None,
    })
}
