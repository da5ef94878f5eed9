//! Memberships of one room that matrix-sdk does not keep: sticky ones (MSC4354), and redactions of state that it missed.

use std::collections::{BTreeMap, HashSet, VecDeque};

use ruma_common::{EventId, OwnedDeviceId, OwnedEventId, OwnedUserId, UserId};
use serde_json::Value;

use crate::{matrix::MemberEvent, time::UnixMillis};

/// Sticky memberships that one user may have in a room; the ones that expire first give way.
const PER_SENDER: usize = 64;
const MOST_SENDERS: usize = 1024;
/// Encrypted events that wait for their room key.
const MOST_UNDECRYPTED: usize = 256;
/// Larger encrypted events are not kept: nothing that a call uses is as large.
const LARGEST_UNDECRYPTED: usize = 16 * 1024;

/// An encrypted event that could not be decrypted yet.
#[derive(Clone, Debug)]
pub(super) struct Undecrypted {
    pub(super) event_id: OwnedEventId,
    pub(super) json: String,
    /// When it came: its remaining stickiness counts from then.
    pub(super) received: UnixMillis,
    pub(super) session_id: Option<String>,
}

#[derive(Debug)]
struct Entry {
    event: MemberEvent,
    /// The Megolm session of an encrypted event whose device is not known yet.
    unknown_session: Option<String>,
}

/// The known sticky events of one room. All bounds are per room.
#[derive(Debug, Default)]
pub(super) struct StickyStore {
    members: BTreeMap<OwnedUserId, BTreeMap<OwnedEventId, Entry>>,
    undecrypted: VecDeque<Undecrypted>,
    /// Redacted state memberships as of the last snapshot, and who redacted them.
    redacted_state: BTreeMap<OwnedEventId, OwnedUserId>,
}

impl StickyStore {
    /// Keeps a membership. Returns whether anything is new.
    pub(super) fn insert(
        &mut self,
        event_id: OwnedEventId,
        event: MemberEvent,
        session: Option<String>,
    ) -> bool {
        if !self.members.contains_key(&event.sender) && self.members.len() >= MOST_SENDERS {
            tracing::warn!(sender = %event.sender, "too many users have sticky call memberships; one is ignored");
            return false;
        }
        let of_sender = self.members.entry(event.sender.clone()).or_default();
        let unknown_session = session.filter(|_| event.sender_device.is_none());
        if let Some(known) = of_sender.get_mut(&event_id) {
            let news = known.event.redacted_by.is_none() && event.redacted_by.is_some()
                || known.event.sender_device.is_none() && event.sender_device.is_some();
            if news {
                *known = Entry { event, unknown_session };
            }
            return news;
        }
        let new = event_id.clone();
        of_sender.insert(event_id, Entry { event, unknown_session });
        if of_sender.len() > PER_SENDER {
            let first = of_sender.iter().min_by_key(|(_, entry)| entry.event.sticky_until);
            let first = first.map(|(id, _)| id.clone());
            if let Some(first) = first {
                of_sender.remove(&first);
                return first != new;
            }
        }
        true
    }

    /// Empties a membership that was redacted. Returns whether it was kept and not redacted before.
    pub(super) fn redact(&mut self, event_id: &EventId, by: &UserId) -> bool {
        self.undecrypted.retain(|event| event.event_id != event_id);
        let entry = self.members.values_mut().find_map(|of_sender| of_sender.get_mut(event_id));
        let Some(entry) = entry.filter(|entry| entry.event.redacted_by.is_none()) else { return false };
        entry.event.content = Value::Object(serde_json::Map::new());
        entry.event.redacted_by = Some(by.to_owned());
        true
    }

    /// Replaces the redacted state memberships. Returns whether any is new.
    pub(super) fn set_redacted_state(&mut self, redacted: BTreeMap<OwnedEventId, OwnedUserId>) -> bool {
        let changed = redacted.keys().any(|event_id| !self.redacted_state.contains_key(event_id));
        self.redacted_state = redacted;
        changed
    }

    /// Sender of the redaction of a state membership, if a snapshot showed it.
    pub(super) fn state_redacted_by(&self, event_id: &EventId) -> Option<OwnedUserId> {
        self.redacted_state.get(event_id).cloned()
    }

    /// Every membership that still sticks, and the newest ones of ours that never did: they tell that the homeserver
    /// has no sticky events.
    pub(super) fn members(&mut self, now: UnixMillis) -> Vec<MemberEvent> {
        for of_sender in self.members.values_mut() {
            of_sender.retain(|_, entry| entry.event.sticky_until.is_none_or(|until| until > now));
        }
        self.members.retain(|_, of_sender| !of_sender.is_empty());
        self.members.values().flatten().map(|(_, entry)| entry.event.clone()).collect()
    }

    /// The events of `sender` whose device is not known, with their Megolm sessions.
    pub(super) fn of_unknown_devices(&self, sender: &UserId) -> Vec<(OwnedEventId, String)> {
        let of_sender = self.members.get(sender).into_iter().flatten();
        of_sender.filter_map(|(id, entry)| Some((id.clone(), entry.unknown_session.clone()?))).collect()
    }

    /// Fills in the device that encrypted an event.
    pub(super) fn set_device(&mut self, sender: &UserId, event_id: &EventId, device: OwnedDeviceId) {
        if let Some(entry) = self.members.get_mut(sender).and_then(|of_sender| of_sender.get_mut(event_id)) {
            entry.event.sender_device = Some(device);
            entry.unknown_session = None;
        }
    }

    /// Keeps an encrypted event until its room key comes. The oldest gives way.
    pub(super) fn wait_for_key(&mut self, event: Undecrypted) {
        if event.json.len() > LARGEST_UNDECRYPTED
            || self.undecrypted.iter().any(|e| e.event_id == event.event_id)
        {
            return;
        }
        if self.undecrypted.len() >= MOST_UNDECRYPTED {
            self.undecrypted.pop_front();
        }
        self.undecrypted.push_back(event);
    }

    /// Takes out the events that one of these Megolm sessions may decrypt; `None`: all.
    pub(super) fn take_undecrypted(&mut self, sessions: Option<&HashSet<String>>) -> Vec<Undecrypted> {
        let fits = |event: &Undecrypted| match (sessions, &event.session_id) {
            (Some(sessions), Some(session)) => sessions.contains(session),
            _ => true,
        };
        let (taken, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.undecrypted).into_iter().partition(fits);
        self.undecrypted = kept.into();
        taken
    }
}

#[cfg(test)]
mod tests {
    use ruma_common::user_id;
    use serde_json::json;

    use super::*;
    use crate::member::MembershipForm;

    fn alice() -> &'static UserId {
        user_id!("@alice:x")
    }

    fn member(sender: &UserId, until: u64) -> MemberEvent {
        MemberEvent {
            form: MembershipForm::Sticky,
            sender: sender.to_owned(),
            sender_device: None,
            encrypted: true,
            state_key: None,
            event_id: None,
            origin_server_ts: UnixMillis(0),
            content: json!({"slot_id": "m.call#ROOM"}),
            sticky_until: Some(UnixMillis(until)),
            sticky_rank: UnixMillis(until),
            redacted_by: None,
        }
    }

    fn id(n: usize) -> OwnedEventId {
        format!("$e{n}").try_into().unwrap()
    }

    fn waiting(n: usize, session: &str) -> Undecrypted {
        Undecrypted {
            event_id: id(n),
            json: String::new(),
            received: UnixMillis(0),
            session_id: Some(session.to_owned()),
        }
    }

    #[test]
    fn expired_members_disappear() {
        let mut store = StickyStore::default();
        assert!(store.insert(id(1), member(alice(), 100), None));
        assert!(!store.insert(id(1), member(alice(), 120), None), "the same event again is not news");
        assert_eq!(store.members(UnixMillis(99)).len(), 1);
        assert_eq!(store.members(UnixMillis(100)), []);
    }

    #[test]
    fn redaction_empties_once() {
        let mut store = StickyStore::default();
        store.insert(id(1), member(alice(), 100), None);
        assert!(store.redact(&id(1), user_id!("@mod:x")));
        assert!(!store.redact(&id(1), user_id!("@mod:x")));
        assert!(!store.redact(&id(2), user_id!("@mod:x")));
        let members = store.members(UnixMillis(0));
        assert_eq!(
            (&members[0].content, members[0].redacted_by.as_deref()),
            (&json!({}), Some(user_id!("@mod:x")))
        );
        assert!(!store.insert(id(1), member(alice(), 100), None), "an older copy does not bring it back");
    }

    #[test]
    fn redacted_state_is_that_of_the_last_snapshot() {
        let mut store = StickyStore::default();
        let moderator = user_id!("@mod:x");
        let redacted = |ids: &[usize]| ids.iter().map(|n| (id(*n), moderator.to_owned())).collect();
        assert!(store.set_redacted_state(redacted(&[1, 2])));
        assert!(
            !store.set_redacted_state(redacted(&[2])),
            "a member that joined again is known from the state"
        );
        assert_eq!(
            (store.state_redacted_by(&id(1)), store.state_redacted_by(&id(2)).as_deref()),
            (None, Some(moderator))
        );
        assert!(store.set_redacted_state(redacted(&[2, 3])));
    }

    #[test]
    fn a_flooding_sender_displaces_only_its_own_events() {
        let mut store = StickyStore::default();
        store.insert(id(0), member(user_id!("@bob:x"), 50), None);
        for n in 1..=PER_SENDER + 10 {
            store.insert(id(n), member(alice(), 100 + n as u64), None);
        }
        let members = store.members(UnixMillis(0));
        assert_eq!(members.len(), PER_SENDER + 1);
        assert_eq!(members.iter().filter_map(|m| m.sticky_until).min(), Some(UnixMillis(50)));
        assert!(!store.insert(id(1), member(alice(), 101), None), "the event that expires first is not kept");
    }

    #[test]
    fn unknown_device_is_filled_in() {
        let mut store = StickyStore::default();
        store.insert(id(1), member(alice(), 100), Some("session".to_owned()));
        assert_eq!(store.of_unknown_devices(alice()), [(id(1), "session".to_owned())]);
        store.set_device(alice(), &id(1), "DEV".into());
        assert_eq!(store.of_unknown_devices(alice()), []);
        assert_eq!(store.members(UnixMillis(0))[0].sender_device.as_deref(), Some("DEV".into()));
    }

    #[test]
    fn undecrypted_events_wait_for_their_session_and_are_bounded() {
        let mut store = StickyStore::default();
        store.wait_for_key(waiting(1, "one"));
        store.wait_for_key(waiting(2, "two"));
        let sessions = HashSet::from(["two".to_owned()]);
        let taken: Vec<_> = store.take_undecrypted(Some(&sessions)).into_iter().map(|e| e.event_id).collect();
        assert_eq!(taken, [id(2)]);
        for n in 10..10 + MOST_UNDECRYPTED {
            store.wait_for_key(waiting(n, "three"));
        }
        let left = store.take_undecrypted(None);
        assert_eq!(left.len(), MOST_UNDECRYPTED);
        assert_eq!(left[0].event_id, id(10), "the oldest gave way");
    }
}
