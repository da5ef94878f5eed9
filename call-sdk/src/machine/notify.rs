//! Around the media: invitations and their ends (MSC4075, MSC4310), reactions and raised hands.
//!
//! *Assumptions.* The port hands over events of the call's room after decryption, and says whether a mention of the
//! whole room by their sender counts. Invitations are judged when they come and again when time passes.

use std::{collections::BTreeMap, time::Duration};

use ruma_common::{OwnedEventId, OwnedUserId, UserId};
use serde_json::{Map, Value, json};

use crate::{
    matrix::{EventTarget, EventWrite, RoomEvent},
    member::{Member, MemberKey, Slot},
    time::{Now, UnixMillis},
};

/// Types of an invitation: what deployed clients send, and the names of the MSC.
const INVITE_TYPES: [&str; 3] = ["org.matrix.msc4075.rtc.notification", "m.rtc.invite", "m.rtc.notification"];
/// Types of a decline.
const DECLINE_TYPES: [&str; 2] = ["org.matrix.msc4310.rtc.decline", "m.rtc.decline"];
const REACTION_TYPE: &str = "io.element.call.reaction";
const HAND_TYPE: &str = "m.reaction";
const HAND: &str = "🖐️";

/// How long our invitations ring: what deployed clients use.
const LIFETIME: Duration = Duration::from_millis(90_000);
/// No invitation rings longer.
const MAX_LIFETIME: Duration = Duration::from_millis(120_000);
/// Our invitations stay visible for clients that sync late; shorter durations should not be used (MSC4354).
const STICKY: Duration = Duration::from_millis(300_000);
/// A sender's clock may be this far ahead of its homeserver's.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(20);
/// Invitations and membership events that are remembered.
const MAX_REMEMBERED: usize = 1024;
/// Longest emoji or name that is shown, in bytes.
const MAX_TEXT: usize = 64;

/// How an invitation asks for attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Attention {
    /// Clients ring.
    Ring,
    /// Clients show a notification.
    Notification,
}

/// An invitation to the call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Invite {
    /// Its event.
    pub event_id: OwnedEventId,
    /// The inviting user.
    pub sender: OwnedUserId,
    /// The call.
    pub slot: Slot,
    /// Whether to ring.
    pub attention: Attention,
    /// When it runs out, by our clock.
    pub expires_at: UnixMillis,
    /// `audio`, `video` or another.
    pub intent: Option<String>,
}

/// Why an invitation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InviteEnd {
    /// Its sender withdrew it.
    Withdrawn,
    /// Another device of ours declined it.
    Declined,
    /// Nobody answered in time.
    Expired,
}

/// What an event means.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Notice {
    Invited(Invite),
    InviteEnded(Invite, InviteEnd),
    /// Somebody declined our invitation.
    Declined(OwnedUserId),
    Reaction {
        member: MemberKey,
        emoji: String,
        name: String,
    },
    Hand {
        member: MemberKey,
        raised: bool,
    },
}

/// The invitations, reactions and hands of one room.
#[derive(Debug)]
pub(crate) struct Notify {
    own_user: OwnedUserId,
    own_invite: Option<OwnedEventId>,
    /// By sender and sticky key.
    invites: BTreeMap<(OwnedUserId, String), Invite>,
    declined: Vec<OwnedEventId>,
    /// Membership events, newest last, and whose they are.
    memberships: Vec<(OwnedEventId, MemberKey, OwnedUserId)>,
    hands: BTreeMap<OwnedEventId, MemberKey>,
    own_hand: Option<OwnedEventId>,
}

impl Notify {
    pub(crate) fn new(own_user: OwnedUserId) -> Self {
        Self {
            own_user,
            own_invite: None,
            invites: BTreeMap::new(),
            declined: Vec::new(),
            memberships: Vec::new(),
            hands: BTreeMap::new(),
            own_hand: None,
        }
    }

    /// Remembers membership events: reactions refer to them, and refreshes replace them.
    pub(crate) fn members(&mut self, members: &[Member]) {
        for member in members {
            let Some(event_id) = &member.event_id else { continue };
            if !self.memberships.iter().any(|(known, ..)| known == event_id) {
                if self.memberships.len() == MAX_REMEMBERED {
                    self.memberships.remove(0);
                }
                self.memberships.push((event_id.clone(), member.key(), member.user_id.clone()));
            }
        }
    }

    /// Hands of members that left are down.
    pub(crate) fn left(&mut self, member: &MemberKey) {
        self.hands.retain(|_, of| of != member);
    }

    /// Reads an event. `in_call` says whether we are in the call: then nothing rings.
    pub(crate) fn receive(&mut self, now: Now, event: &RoomEvent, in_call: bool) -> Option<Notice> {
        let kind = event.event_type.as_str();
        if INVITE_TYPES.contains(&kind) {
            self.invite(now, event, in_call)
        } else if DECLINE_TYPES.contains(&kind) {
            self.decline(event)
        } else if kind == REACTION_TYPE {
            let member = self.membership(related(&event.content, "m.reference")?, &event.sender)?;
            let text =
                |name| event.content.get(name).and_then(Value::as_str).filter(|text| text.len() <= MAX_TEXT);
            let (emoji, name) = (text("emoji")?, text("name").unwrap_or_default());
            Some(Notice::Reaction { member, emoji: emoji.to_owned(), name: name.to_owned() })
        } else if kind == HAND_TYPE {
            let relation = event.content.get("m.relates_to")?;
            if relation.get("key").and_then(Value::as_str) != Some(HAND) || self.hands.len() >= MAX_REMEMBERED
            {
                return None;
            }
            let member = self.membership(related(&event.content, "m.annotation")?, &event.sender)?;
            self.hands.insert(event.event_id.clone(), member.clone());
            Some(Notice::Hand { member, raised: true })
        } else if let Some(redacted) = &event.redacts {
            if let Some(member) = self.hands.remove(redacted) {
                return Some(Notice::Hand { member, raised: false });
            }
            let key = self.invites.iter().find(|(_, invite)| invite.event_id == *redacted)?.0.clone();
            self.end_invite(&key, InviteEnd::Withdrawn)
        } else {
            None
        }
    }

    /// Invitations that have run out.
    pub(crate) fn expired(&mut self, now: Now) -> Vec<Notice> {
        let is_over = |invite: &Invite| now.unix >= invite.expires_at;
        let over: Vec<_> =
            self.invites.iter().filter(|(_, i)| is_over(i)).map(|(key, _)| key.clone()).collect();
        over.iter().filter_map(|key| self.end_invite(key, InviteEnd::Expired)).collect()
    }

    fn invite(&mut self, now: Now, event: &RoomEvent, in_call: bool) -> Option<Notice> {
        let content = event.content.as_object()?;
        let sticky_key = sticky_key(content).unwrap_or_else(|| event.event_id.to_string());
        if sticky_key.len() > 255 || event.sender == self.own_user {
            return None;
        }
        let key = (event.sender.clone(), sticky_key.clone());
        let slot_id = content.get("slot_id").and_then(Value::as_str);
        if slot_id.is_none() && !content.contains_key("sender_ts") {
            return self.end_invite(&key, InviteEnd::Withdrawn);
        }
        // The first generations name no slot: they know only the room call.
        let slot = slot_id.map_or_else(|| Some(Slot::room_call()), Slot::parse)?;
        if slot_id.is_some_and(|slot_id| content.contains_key("sticky_key") && sticky_key != slot_id) {
            return None;
        }
        let millis = |name| content.get(name).and_then(Value::as_u64).map(UnixMillis);
        let sent = millis("sender_ts")?;
        let base =
            if sent.since(event.origin_server_ts) > CLOCK_TOLERANCE { event.origin_server_ts } else { sent };
        let lifetime = Duration::from_millis(millis("lifetime")?.0).min(MAX_LIFETIME);
        let expires_at = base.plus(lifetime).min(now.unix.plus(MAX_LIFETIME));
        let is_declined = self.declined.contains(&event.event_id);
        if in_call
            || is_declined
            || now.unix >= expires_at
            || !self.mentions_us(content, event.may_mention_room)
        {
            return None;
        }
        let attention = match content.get("notification_type").and_then(Value::as_str) {
            Some("notification") => Attention::Notification,
            _ => Attention::Ring,
        };
        let intent = content.get("m.call.intent").and_then(Value::as_str);
        let invite = Invite {
            event_id: event.event_id.clone(),
            sender: event.sender.clone(),
            slot,
            attention,
            expires_at,
            intent: intent.filter(|intent| intent.len() <= MAX_TEXT).map(str::to_owned),
        };
        if self.invites.get(&key) == Some(&invite) || self.invites.len() >= MAX_REMEMBERED {
            return None;
        }
        self.invites.insert(key, invite.clone());
        Some(Notice::Invited(invite))
    }

    fn mentions_us(&self, content: &Map<String, Value>, may_mention_room: bool) -> bool {
        let Some(mentions) = content.get("m.mentions") else { return false };
        let room = mentions.get("room").and_then(Value::as_bool) == Some(true);
        let users = mentions.get("user_ids").and_then(Value::as_array);
        let us =
            users.is_some_and(|users| users.iter().any(|user| user.as_str() == Some(self.own_user.as_str())));
        us || (room && may_mention_room)
    }

    fn decline(&mut self, event: &RoomEvent) -> Option<Notice> {
        let invite = related(&event.content, "m.reference")?;
        if event.sender == self.own_user {
            if self.declined.len() == MAX_REMEMBERED {
                self.declined.remove(0);
            }
            self.declined.push(OwnedEventId::try_from(invite).ok()?);
            let key = self.invites.iter().find(|(_, known)| known.event_id == invite)?.0.clone();
            return self.end_invite(&key, InviteEnd::Declined);
        }
        (self.own_invite.as_ref().is_some_and(|own| own == invite))
            .then(|| Notice::Declined(event.sender.clone()))
    }

    fn end_invite(&mut self, key: &(OwnedUserId, String), end: InviteEnd) -> Option<Notice> {
        self.invites.remove(key).map(|invite| Notice::InviteEnded(invite, end))
    }

    /// The member whose membership event this is, if `sender` is that member.
    fn membership(&self, event_id: &str, sender: &UserId) -> Option<MemberKey> {
        let (_, member, owner) = self.memberships.iter().find(|(known, ..)| known == event_id)?;
        (owner == sender).then(|| member.clone())
    }

    /// Our invitation was sent.
    pub(crate) fn own_invite_sent(&mut self, event_id: OwnedEventId) {
        self.own_invite = Some(event_id);
    }

    /// Our raised hand was sent.
    pub(crate) fn own_hand_sent(&mut self, event_id: OwnedEventId) {
        self.own_hand = Some(event_id);
    }

    /// The raised hand to redact, if ours is up.
    pub(crate) fn take_own_hand(&mut self) -> Option<OwnedEventId> {
        self.own_hand.take()
    }

    /// Whether an invitation of ours is out, which leaving alone withdraws.
    pub(crate) fn take_own_invite(&mut self) -> Option<OwnedEventId> {
        self.own_invite.take()
    }
}

/// Our invitation to everybody in the room: what every generation reads.
pub(crate) fn invite(
    now: Now,
    slot: &Slot,
    attention: Attention,
    intent: Option<&str>,
    membership: Option<&OwnedEventId>,
) -> EventWrite {
    let mut content = json!({
        "slot_id": slot.slot_id(),
        "sender_ts": now.unix.0,
        "lifetime": u64::try_from(LIFETIME.as_millis()).unwrap_or(u64::MAX),
        "m.mentions": { "room": true, "user_ids": [] },
        "sticky_key": slot.slot_id(),
        "msc4354_sticky_key": slot.slot_id(),
        "notification_type": match attention {
            Attention::Ring => "ring",
            Attention::Notification => "notification",
        },
    });
    if let Some(intent) = intent {
        content["m.call.intent"] = json!(intent);
    }
    if let Some(event_id) = membership {
        content["m.relates_to"] = json!({ "rel_type": "m.reference", "event_id": event_id });
    }
    sticky(INVITE_TYPES[0], content)
}

/// The withdrawal of our invitation.
pub(crate) fn withdrawal(slot: &Slot) -> EventWrite {
    sticky(INVITE_TYPES[0], json!({ "sticky_key": slot.slot_id(), "msc4354_sticky_key": slot.slot_id() }))
}

/// Our answer to an invitation that we do not follow.
pub(crate) fn decline(invite: &OwnedEventId) -> EventWrite {
    let content = json!({
        "m.relates_to": { "rel_type": "m.reference", "event_id": invite },
        "sticky_key": invite,
        "msc4354_sticky_key": invite,
    });
    sticky(DECLINE_TYPES[0], content)
}

/// Our reaction, which others show for 3 s.
pub(crate) fn reaction(membership: &OwnedEventId, emoji: &str, name: &str) -> EventWrite {
    let content = json!({
        "m.relates_to": { "rel_type": "m.reference", "event_id": membership },
        "emoji": emoji,
        "name": name,
    });
    EventWrite {
        event_type: REACTION_TYPE.to_owned(),
        target: EventTarget::Message { sticky: None },
        content,
    }
}

/// Our raised hand. Deployed clients send and read it in clear.
pub(crate) fn raised_hand(membership: &OwnedEventId) -> EventWrite {
    let content = json!({
        "m.relates_to": { "rel_type": "m.annotation", "event_id": membership, "key": HAND },
    });
    EventWrite {
        event_type: HAND_TYPE.to_owned(),
        target: EventTarget::ClearMessage { sticky: None },
        content,
    }
}

fn sticky(event_type: &str, content: Value) -> EventWrite {
    EventWrite {
        event_type: event_type.to_owned(),
        target: EventTarget::Message { sticky: Some(STICKY) },
        content,
    }
}

fn related<'a>(content: &'a Value, rel_type: &str) -> Option<&'a str> {
    let relation = content.get("m.relates_to")?;
    (relation.get("rel_type")?.as_str()? == rel_type).then(|| relation.get("event_id")?.as_str())?
}

fn sticky_key(content: &Map<String, Value>) -> Option<String> {
    let key = content.get("msc4354_sticky_key").or_else(|| content.get("sticky_key"))?;
    key.as_str().map(str::to_owned)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::machine::testing;

    const T0: u64 = 1_790_000_000_000;

    fn now(after: u64) -> Now {
        Now { instant: Instant::now(), unix: UnixMillis(T0 + after) }
    }

    fn bob() -> OwnedUserId {
        OwnedUserId::try_from("@bob:example.org").unwrap()
    }

    fn event(id: &str, sender: &str, write: EventWrite) -> RoomEvent {
        RoomEvent {
            event_id: OwnedEventId::try_from(id).unwrap(),
            event_type: write.event_type,
            sender: OwnedUserId::try_from(sender).unwrap(),
            origin_server_ts: UnixMillis(T0),
            content: write.content,
            sticky_until: None,
            redacts: None,
            may_mention_room: true,
        }
    }

    fn ringing(id: &str) -> RoomEvent {
        event(
            id,
            "@alice:example.org",
            invite(now(0), &Slot::room_call(), Attention::Ring, Some("video"), None),
        )
    }

    #[test]
    fn invitation_rings_until_it_is_withdrawn() {
        let mut notify = Notify::new(bob());
        let Some(Notice::Invited(invite)) = notify.receive(now(1_000), &ringing("$1"), false) else {
            panic!("it rings")
        };
        assert_eq!((invite.attention, invite.expires_at), (Attention::Ring, UnixMillis(T0 + 90_000)));
        assert_eq!(invite.intent.as_deref(), Some("video"));
        let withdrawn = event("$2", "@alice:example.org", withdrawal(&Slot::room_call()));
        let end = notify.receive(now(2_000), &withdrawn, false);
        assert_eq!(end, Some(Notice::InviteEnded(invite, InviteEnd::Withdrawn)));
        assert_eq!(notify.receive(now(2_000), &withdrawn, false), None);
    }

    #[test]
    fn invitation_does_not_ring_when_it_should_not() {
        let ring = |change: &dyn Fn(&mut RoomEvent), at, in_call| {
            let mut event = ringing("$1");
            change(&mut event);
            Notify::new(bob()).receive(now(at), &event, in_call).is_some()
        };
        assert!(ring(&|_| {}, 0, false));
        assert!(!ring(&|_| {}, 0, true), "in the call already");
        assert!(!ring(&|_| {}, 90_000, false), "too late");
        assert!(!ring(&|event| event.sender = bob(), 0, false), "our own");
        assert!(!ring(&|event| event.may_mention_room = false, 0, false), "no power to mention the room");
        assert!(!ring(&|event| event.content["m.mentions"] = json!({}), 0, false), "nobody is mentioned");
        let to_us =
            |event: &mut RoomEvent| event.content["m.mentions"] = json!({ "user_ids": ["@bob:example.org"] });
        assert!(ring(&to_us, 0, false));
        let ahead = |event: &mut RoomEvent| event.content["sender_ts"] = json!(T0 + 10_000_000);
        assert!(!ring(&ahead, 95_000, false), "a clock that runs ahead does not ring longer");
        assert!(!ring(&|event| event.content["slot_id"] = json!("nonsense"), 0, false));
    }

    #[test]
    fn declining_elsewhere_ends_ringing_and_ours_is_reported() {
        let mut notify = Notify::new(bob());
        let rung = notify.receive(now(0), &ringing("$1"), false);
        assert!(rung.is_some());
        let invite = OwnedEventId::try_from("$1").unwrap();
        let declined = event("$2", "@bob:example.org", decline(&invite));
        assert!(matches!(
            notify.receive(now(1), &declined, false),
            Some(Notice::InviteEnded(_, InviteEnd::Declined))
        ));
        assert_eq!(notify.receive(now(2), &ringing("$1"), false), None);

        notify.own_invite_sent(OwnedEventId::try_from("$3").unwrap());
        let theirs = event("$4", "@carol:example.org", decline(&OwnedEventId::try_from("$3").unwrap()));
        let carol = OwnedUserId::try_from("@carol:example.org").unwrap();
        assert_eq!(notify.receive(now(3), &theirs, true), Some(Notice::Declined(carol)));
    }

    #[test]
    fn unanswered_invitation_expires() {
        let mut notify = Notify::new(bob());
        notify.receive(now(0), &ringing("$1"), false);
        assert!(notify.expired(now(89_999)).is_empty());
        assert!(matches!(notify.expired(now(90_000))[..], [Notice::InviteEnded(_, InviteEnd::Expired)]));
    }

    #[test]
    fn reactions_and_hands_belong_to_the_owner_of_the_membership() {
        let mut notify = Notify::new(bob());
        let mut alice = testing::state_member("@alice:example.org", "A", 0);
        let membership = OwnedEventId::try_from("$member").unwrap();
        alice.event_id = Some(membership.clone());
        notify.members(std::slice::from_ref(&alice));
        let party = event("$1", "@alice:example.org", reaction(&membership, "🎉", "party"));
        assert!(
            matches!(notify.receive(now(0), &party, true), Some(Notice::Reaction { emoji, .. }) if emoji == "🎉")
        );
        let forged = event("$2", "@mallory:example.org", reaction(&membership, "🎉", "party"));
        assert_eq!(notify.receive(now(0), &forged, true), None);

        let up = event("$3", "@alice:example.org", raised_hand(&membership));
        let raised = |raised| Some(Notice::Hand { member: alice.key(), raised });
        assert_eq!(notify.receive(now(0), &up, true), raised(true));
        let mut down = event("$4", "@alice:example.org", raised_hand(&membership));
        down.event_type = "m.room.redaction".to_owned();
        down.redacts = Some(OwnedEventId::try_from("$3").unwrap());
        assert_eq!(notify.receive(now(0), &down, true), raised(false));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_content_never_panics(kind in 0_usize..6, field in "[a-z_.0-9]{1,20}", text in "\\PC{0,40}") {
            let types = ["m.rtc.invite", "m.rtc.decline", REACTION_TYPE, HAND_TYPE, "m.room.redaction", "x"];
            let mut event = ringing("$1");
            event.event_type = types[kind].to_owned();
            event.content[field] = json!(text);
            Notify::new(bob()).receive(now(0), &event, false);
        }
    }
}
