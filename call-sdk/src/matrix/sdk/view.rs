//! The room as of the last sync, the sticky events that matrix-sdk drops, and the redactions that it missed.
//!
//! matrix-sdk 0.19 hands out sticky events only as ordinary events of the timeline. It drops the section of `/sync` with
//! those that fell out of it, and the stickiness of encrypted ones. So this room keeps its own store, fed by
//!
//! * the timeline, where an encrypted event is fetched once more, as its stickiness lies outside the encryption;
//! * a *snapshot*: a `/sync` of this room alone without `since`. It acknowledges nothing, so the client loses no to-device
//!   message to it. It is taken when a listener starts and after each gap.
//!
//! matrix-sdk empties redacted state when the redaction comes in a timeline. It misses a redaction that falls into a gap,
//! so the snapshot includes the state memberships.

use std::{collections::HashSet, sync::atomic::Ordering};

use matrix_sdk::{
    deserialized_responses::{EncryptionInfo, TimelineEventKind, VerificationLevel, VerificationState},
    ruma::{
        EventId, OwnedDeviceId, OwnedEventId, OwnedUserId, RoomId,
        events::{StateEventType, room::encrypted::OriginalSyncRoomEncryptedEvent},
        serde::Raw,
    },
};
use rand::Rng as _;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::{
    Inner, OWN_LIMIT,
    events::{self, WireEvent, is_sticky_member, is_timeline_type},
    failed,
    http::{Ask, sdk_error},
    now,
    sticky::Undecrypted,
};
use crate::{
    matrix::{MatrixError, MemberEvent, RequestError, RoomEvent, RoomView, SlotEvent},
    member::MembershipForm,
    time::UnixMillis,
};

/// A snapshot holds every sticky event and state membership; each is at most 64 KiB, and most are under one.
const LARGEST_SNAPSHOT: usize = 16 * 1024 * 1024;

/// Effect of incoming events on the call.
#[derive(Debug, Default)]
pub(super) struct News {
    /// The room view changed.
    pub(super) changed: bool,
    /// Events to hand out; a snapshot may repeat some.
    pub(super) events: Vec<RoomEvent>,
}

impl News {
    pub(super) fn add(&mut self, other: Self) {
        self.changed |= other.changed;
        self.events.extend(other.events);
    }
}

/// How an event was encrypted, as far as a call trusts it.
#[derive(Clone, Debug)]
struct Megolm {
    device: Option<OwnedDeviceId>,
    session: Option<String>,
}

impl Inner {
    pub(super) async fn room_view(&self) -> Result<RoomView, MatrixError> {
        let mut is_loaded = self.is_loaded.lock().await;
        if !*is_loaded || self.listeners.load(Ordering::Relaxed) == 0 {
            self.snapshot()
                .await
                .map_err(failed("list the sticky events and redacted members of the room"))?;
            *is_loaded = true;
        }
        drop(is_loaded);
        let state = self.room.latest_encryption_state().await;
        let state = state.map_err(failed("tell whether the room is encrypted"))?;
        let members = self.state(events::STATE_MEMBER[0], "list the call members").await?;
        let mut members: Vec<_> = {
            let store = self.sticky();
            let redacted_by =
                |event: &WireEvent| event.redacted_by().or_else(|| store.state_redacted_by(&event.event_id));
            members.into_iter().map(|event| state_member(redacted_by(&event), event)).collect()
        };
        let mut slots = Vec::new();
        for event_type in events::SLOT {
            let of_type = self.state(event_type, "list the slots of the room").await?;
            slots.extend(
                of_type.into_iter().filter_map(|event| {
                    Some(SlotEvent { slot_id: event.state_key?, content: event.content })
                }),
            );
        }
        self.room.sync_members().await.map_err(failed("list the members of the room"))?;
        let joined = self.room.joined_user_ids().await.map_err(failed("list the members of the room"))?;
        members.extend(self.sticky().members(now()));
        Ok(RoomView {
            members,
            slots,
            joined: joined.into_iter().collect(),
            // An unknown state counts as encrypted: the mistake that leaks nothing.
            encrypted: state.is_encrypted() || state.is_unknown(),
            version: self.room.version().map(|version| version.to_string()).unwrap_or_default(),
        })
    }

    async fn state(&self, event_type: &str, doing: &'static str) -> Result<Vec<WireEvent>, MatrixError> {
        use matrix_sdk::deserialized_responses::RawAnySyncOrStrippedState as Stored;
        let stored =
            self.room.get_state_events(StateEventType::from(event_type)).await.map_err(failed(doing))?;
        let parsed = stored.iter().filter_map(|event| match event {
            Stored::Sync(raw) => WireEvent::parse(raw.json().get()),
            Stored::Stripped(_) => None,
        });
        Ok(parsed.collect())
    }

    /// Reads every event of the room that is still sticky, and which state memberships are redacted.
    pub(super) async fn snapshot(&self) -> Result<News, RequestError> {
        let filter = snapshot_filter(self.room.room_id()).to_string();
        let path = ["_matrix", "client", "v3", "sync"];
        let ask = Ask::get(&path)
            .query("filter", filter)
            .query("timeout", "0")
            .query("set_presence", "offline")
            .largest_answer(LARGEST_SNAPSHOT);
        let answer = self.ask(ask, OWN_LIMIT).await?;
        let received = now();
        let room = answer.pointer("/rooms/join").and_then(|rooms| rooms.get(self.room.room_id().as_str()));
        let section = |name: &str| {
            let events = room.and_then(|room| room.get(name)?.get("events")?.as_array());
            events.into_iter().flatten()
        };
        let redacted = section("state").chain(section("timeline")).filter_map(redacted_state_member);
        let changed = self.sticky().set_redacted_state(redacted.collect());
        let mut news = News { changed, events: Vec::new() };
        // Other events of the timeline have been seen in the sync.
        let is_sticky =
            |event: &&Value| event.get("sticky").or_else(|| event.get("msc4354_sticky")).is_some();
        let timeline = section("timeline").filter(is_sticky);
        for event in section("sticky").chain(section("msc4354_sticky")).chain(timeline) {
            news.add(self.take_in(&event.to_string(), received).await);
        }
        Ok(news)
    }

    /// Fetches an event with the outer fields that matrix-sdk drops on decryption, and takes it in.
    pub(super) async fn fetch(&self, event_id: &EventId) -> Result<News, RequestError> {
        let path =
            ["_matrix", "client", "v3", "rooms", self.room.room_id().as_str(), "event", event_id.as_str()];
        let event = self.ask(Ask::get(&path), OWN_LIMIT).await?;
        Ok(self.take_in(&event.to_string(), now()).await)
    }

    /// Takes in an event as the homeserver sent it, encrypted or not.
    pub(super) async fn take_in(&self, json: &str, received: UnixMillis) -> News {
        let Some(event) = WireEvent::parse(json) else { return News::default() };
        // A redacted event has lost its content, and on Synapse its stickiness too.
        if let Some(by) = event.redacted_by() {
            let changed = self.sticky().redact(&event.event_id, &by);
            return News { changed, events: Vec::new() };
        }
        if event.event_type != events::ENCRYPTED {
            let (event_type, content) = (event.event_type.clone(), event.content.clone());
            return self.sort(event, event_type, content, None, received).await;
        }
        match self.decrypt(json).await {
            Ok(Some((event_type, content, megolm))) => {
                self.sort(event, event_type, content, Some(megolm), received).await
            }
            Ok(None) => News::default(),
            Err(session_id) => {
                self.sticky().wait_for_key(Undecrypted {
                    event_id: event.event_id,
                    json: json.to_owned(),
                    received,
                    session_id,
                });
                News::default()
            }
        }
    }

    /// Decrypts an event. Returns `None` if it is to be ignored, and its Megolm session as the error if the key is missing.
    async fn decrypt(&self, json: &str) -> Result<Option<(String, Value, Megolm)>, Option<String>> {
        #[derive(Deserialize)]
        struct Inside {
            #[serde(rename = "type")]
            event_type: String,
            #[serde(default)]
            content: Value,
        }
        let Ok(raw) = Raw::<OriginalSyncRoomEncryptedEvent>::from_json_string(json.to_owned()) else {
            return Ok(None);
        };
        let decrypted = match self.room.decrypt_event(&raw, None).await {
            Ok(event) => event,
            Err(error) => {
                tracing::debug!(error = %sdk_error(&error), "an event of a call cannot be decrypted");
                return Ok(None);
            }
        };
        match &decrypted.kind {
            TimelineEventKind::Decrypted(event) => {
                let Some(megolm) = megolm(&event.encryption_info) else { return Ok(None) };
                let inside = serde_json::from_str::<Inside>(event.event.json().get());
                Ok(inside.ok().map(|inside| (inside.event_type, inside.content, megolm)))
            }
            TimelineEventKind::UnableToDecrypt { utd_info, .. } => Err(utd_info.session_id.clone()),
            TimelineEventKind::PlainText { .. } => Ok(None),
        }
    }

    /// Files a readable event: `wire` as it lies outside the encryption, type and content from inside.
    async fn sort(
        &self,
        wire: WireEvent,
        event_type: String,
        content: Value,
        megolm: Option<Megolm>,
        received: UnixMillis,
    ) -> News {
        if wire.state_key.is_some() {
            return News::default();
        }
        let stickiness = wire.stickiness(received);
        if is_sticky_member(&event_type) {
            // Without stickiness it is not a membership. Our own shows that the homeserver has no sticky events.
            if stickiness.is_none() && wire.sender != self.device.user_id {
                return News::default();
            }
            let (encrypted, session) = (megolm.is_some(), megolm.as_ref().and_then(|m| m.session.clone()));
            let event = MemberEvent {
                form: MembershipForm::Sticky,
                sender: wire.sender,
                sender_device: megolm.and_then(|m| m.device),
                encrypted,
                state_key: None,
                event_id: Some(wire.event_id.clone()),
                origin_server_ts: wire.origin_server_ts,
                content,
                sticky_until: stickiness.map(|s| s.until),
                sticky_rank: stickiness.map_or(wire.origin_server_ts, |s| s.rank),
                redacted_by: None,
            };
            let changed = self.sticky().insert(wire.event_id, event, session);
            return News { changed, events: Vec::new() };
        }
        // A redaction counts in clear only: the homeserver must see it to judge it.
        let is_redaction = event_type == events::REDACTION;
        if !is_timeline_type(&event_type) || is_redaction && megolm.is_some() {
            return News::default();
        }
        let redacts = if is_redaction { wire.redacts() } else { None };
        if let Some(target) = &redacts {
            self.sticky().redact(target, &wire.sender);
        }
        let levels = self.room.power_levels().await;
        let event = RoomEvent {
            may_mention_room: levels
                .is_ok_and(|levels| levels.user_can_trigger_room_notification(&wire.sender)),
            event_id: wire.event_id,
            event_type,
            sender: wire.sender,
            origin_server_ts: wire.origin_server_ts,
            content,
            sticky_until: stickiness.map(|s| s.until),
            redacts,
        };
        // The target may be a state membership. By now matrix-sdk has emptied it.
        News { changed: is_redaction, events: vec![event] }
    }

    /// Takes in an event of the timeline that matrix-sdk has decrypted, unless its stickiness matters: then it has to
    /// be fetched, and its id is returned.
    pub(super) async fn take_in_decrypted(
        &self,
        event: &RawValue,
        info: &EncryptionInfo,
        received: UnixMillis,
    ) -> Result<News, OwnedEventId> {
        // matrix-sdk takes sender, id, time and `unsigned` from outside, and leaves everything else as the sender wrote it
        // inside, be it a state key or stickiness.
        let Some(mut wire) = WireEvent::parse(event.get()) else { return Ok(News::default()) };
        wire.drop_plaintext_fields();
        if wire.redacted_by().is_some() {
            return Ok(News::default());
        }
        if is_sticky_member(&wire.event_type) {
            return Err(wire.event_id);
        }
        if !is_timeline_type(&wire.event_type) {
            return Ok(News::default());
        }
        if wire.has_remaining_time() {
            return Err(wire.event_id);
        }
        let Some(megolm) = megolm(info) else { return Ok(News::default()) };
        let (event_type, content) = (wire.event_type.clone(), wire.content.clone());
        Ok(self.sort(wire, event_type, content, Some(megolm), received).await)
    }

    /// Tries again to decrypt the events that wait for these Megolm sessions; `None`: all of them.
    pub(super) async fn decrypt_waiting(&self, sessions: Option<&HashSet<String>>) -> News {
        let waiting = self.sticky().take_undecrypted(sessions);
        let mut news = News::default();
        for event in waiting {
            news.add(self.take_in(&event.json, event.received).await);
        }
        news
    }

    /// Fills in the devices of memberships whose sender's device list has changed. Returns whether any became known.
    pub(super) async fn learn_devices(&self, user: &OwnedUserId) -> bool {
        let mut changed = false;
        let unknown = self.sticky().of_unknown_devices(user);
        for (event_id, session) in unknown {
            let info = self.room.get_encryption_info(&session, user).await;
            if let Some(device) = info.and_then(|info| megolm(&info)).and_then(|megolm| megolm.device) {
                self.sticky().set_device(user, &event_id, device);
                changed = true;
            }
        }
        changed
    }
}

/// `None` if the homeserver attributes the event to another user than the session belongs to. The device counts only
/// if the key came from itself: a key from a backup or a forwarded one names any device.
fn megolm(info: &EncryptionInfo) -> Option<Megolm> {
    let is_linked = match &info.verification_state {
        VerificationState::Unverified(VerificationLevel::MismatchedSender) => {
            tracing::warn!(sender = %info.sender, "an event of a call is not from the owner of its session; ignored");
            return None;
        }
        VerificationState::Unverified(VerificationLevel::None(_)) => false,
        VerificationState::Unverified(_) | VerificationState::Verified => true,
    };
    let device = info.sender_device.clone().filter(|_| is_linked);
    Some(Megolm { device, session: info.session_id().map(str::to_owned) })
}

fn state_member(redacted_by: Option<OwnedUserId>, event: WireEvent) -> MemberEvent {
    MemberEvent {
        form: MembershipForm::State,
        sender: event.sender,
        sender_device: None,
        encrypted: false,
        state_key: event.state_key,
        event_id: Some(event.event_id),
        origin_server_ts: event.origin_server_ts,
        content: if redacted_by.is_some() { json!({}) } else { event.content },
        sticky_until: None,
        sticky_rank: event.origin_server_ts,
        redacted_by,
    }
}

/// Id of a redacted state membership, and who redacted it; `None` for any other event.
fn redacted_state_member(event: &Value) -> Option<(OwnedEventId, OwnedUserId)> {
    let event = WireEvent::deserialize(event).ok().filter(events::is_state_member)?;
    let by = event.redacted_by()?;
    Some((event.event_id, by))
}

/// One room: its newest event, its sticky events and its state memberships. Synapse caches the answers to equal syncs
/// without `since` for two minutes, so each filter is unique.
fn snapshot_filter(room: &RoomId) -> Value {
    let nothing = json!({"types": [], "not_types": ["*"]});
    let unique = format!("snapshot-{}", rand::rng().random::<u64>());
    json!({
        "room": {
            "rooms": [room],
            "timeline": {"limit": 1},
            "state": {"types": events::STATE_MEMBER, "lazy_load_members": true},
            "ephemeral": nothing,
            "account_data": nothing,
        },
        "presence": nothing,
        "account_data": {"types": [], "not_types": ["*", unique]},
    })
}
