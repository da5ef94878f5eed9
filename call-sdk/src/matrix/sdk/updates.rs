//! Updates for a call: room changes, to-device messages, timeline events, trust, state of the sync.
//!
//! One task per listener. It never awaits a request: the channel of room updates holds only eight syncs, so requests run
//! as jobs beside it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream};
use matrix_sdk::{
    deserialized_responses::{
        AlgorithmInfo, EncryptionInfo, TimelineEventKind, VerificationLevel, VerificationState,
    },
    event_handler::EventHandlerDropGuard,
    ruma::{EventId, OwnedEventId, OwnedUserId, events::AnyToDeviceEvent, serde::Raw},
    sync::{JoinedRoomUpdate, RoomUpdate, State},
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    Inner,
    events::{self, WireEvent},
    now,
    view::News,
};
use crate::matrix::{MatrixUpdate, OlmSender, RequestError, ToDeviceEvent};

/// How many updates may wait for the call; key messages beyond it are dropped and their senders retry.
const QUEUE: usize = 1024;
/// Between two snapshots of the sticky events.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_SNAPSHOT_PAUSE: Duration = Duration::from_secs(60);
/// Jobs at a time.
const MOST_JOBS: usize = 16;
/// Between two questions for the devices of one user.
const QUERY_PAUSE: Duration = Duration::from_secs(10);
const QUERY_LIMIT: Duration = Duration::from_secs(10);
/// Messages of unknown devices that are kept until their device is known.
const MOST_UNKNOWN: usize = 64;
/// Events that are known to have been handed out: as many as a room can have that stick.
const MOST_SEEN: usize = 4096;
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(120);

/// Starts to listen.
pub(super) async fn listen(inner: Arc<Inner>) -> mpsc::Receiver<MatrixUpdate> {
    let (tx, rx) = mpsc::channel(QUEUE);
    // Events from before this listener are missing.
    *inner.is_loaded.lock().await = false;
    inner.listeners.fetch_add(1, Ordering::Relaxed);
    let (heard, hears) = mpsc::channel(QUEUE);
    let encryption = inner.client().encryption();
    let listener = Listener {
        _to_device: hear_to_device(&inner, heard),
        to_device: hears,
        rooms: inner.room.subscribe_to_updates(),
        changed_users: changed_users(&encryption).await,
        room_keys: room_keys(&inner).await,
        syncing: inner.syncing.clone(),
        jobs: JoinSet::new(),
        to_fetch: VecDeque::new(),
        seen: Seen::default(),
        snapshot_at: Some(Instant::now()),
        last_snapshot: None,
        is_reading: false,
        snapshot_pause: SNAPSHOT_PAUSE,
        unknown: VecDeque::new(),
        queried: BTreeMap::new(),
        owed: Owed::default(),
        tx,
        inner: inner.clone(),
    };
    tokio::spawn(async move {
        listener.run().await;
        inner.listeners.fetch_sub(1, Ordering::Relaxed);
    });
    rx
}

struct Listener {
    inner: Arc<Inner>,
    tx: mpsc::Sender<MatrixUpdate>,
    /// Updates that found the queue full and must not be lost.
    owed: Owed,
    _to_device: EventHandlerDropGuard,
    to_device: mpsc::Receiver<Heard>,
    rooms: broadcast::Receiver<RoomUpdate>,
    changed_users: stream::BoxStream<'static, BTreeSet<OwnedUserId>>,
    room_keys: stream::BoxStream<'static, Option<HashSet<String>>>,
    syncing: Option<tokio::sync::watch::Receiver<bool>>,
    jobs: JoinSet<Done>,
    to_fetch: VecDeque<OwnedEventId>,
    seen: Seen,
    /// When the sticky events are to be read again.
    snapshot_at: Option<Instant>,
    last_snapshot: Option<Instant>,
    is_reading: bool,
    snapshot_pause: Duration,
    unknown: VecDeque<Unknown>,
    queried: BTreeMap<OwnedUserId, Instant>,
}

#[derive(Default)]
struct Owed {
    room_changed: bool,
    syncing: Option<bool>,
}

impl Owed {
    fn is_some(&self) -> bool {
        self.room_changed || self.syncing.is_some()
    }

    fn take(&mut self) -> Option<MatrixUpdate> {
        if std::mem::take(&mut self.room_changed) {
            return Some(MatrixUpdate::RoomChanged);
        }
        self.syncing.take().map(MatrixUpdate::Syncing)
    }
}

/// A to-device message as the event handler got it.
struct Heard {
    json: String,
    info: Option<EncryptionInfo>,
}

/// A message of a device that its owner's list does not hold, or not as cross-signed.
struct Unknown {
    event: ToDeviceEvent,
    sender_key: String,
    since: Instant,
}

/// The events that were handed out last.
#[derive(Default)]
struct Seen {
    ids: HashSet<OwnedEventId>,
    order: VecDeque<OwnedEventId>,
}

impl Seen {
    /// Whether the event was not handed out before; it counts as handed out from now on.
    fn is_first_sight(&mut self, event_id: &EventId) -> bool {
        if !self.ids.insert(event_id.to_owned()) {
            return false;
        }
        self.order.push_back(event_id.to_owned());
        if self.order.len() > MOST_SEEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

/// Result of a job.
enum Done {
    News(News),
    Snapshot(Result<News, RequestError>),
    Fetched(OwnedEventId, Result<News, RequestError>),
    Devices(OwnedUserId),
}

impl Listener {
    async fn run(mut self) {
        let tx = self.tx.clone();
        loop {
            self.start_jobs();
            let due = self.snapshot_at.filter(|_| !self.is_reading);
            tokio::select! {
                () = tx.closed() => return,
                Ok(permit) = tx.reserve(), if self.owed.is_some() => {
                    if let Some(update) = self.owed.take() {
                        permit.send(update);
                    }
                }
                heard = self.to_device.recv() => if let Some(heard) = heard { self.hear(heard) },
                update = self.rooms.recv() => match update {
                    Ok(update) => self.room_update(update).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.snapshot_again(SNAPSHOT_PAUSE);
                        self.tell(MatrixUpdate::RoomChanged);
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                Some(users) = self.changed_users.next() => self.users_changed(users).await,
                Some(sessions) = self.room_keys.next() => {
                    let inner = self.inner.clone();
                    self.jobs.spawn(async move { Done::News(inner.decrypt_waiting(sessions.as_ref()).await) });
                }
                syncing = next_change(&mut self.syncing) => {
                    // A session that cannot store the redactions of a sync leaves them out.
                    if syncing {
                        self.snapshot_again(Duration::ZERO);
                    }
                    self.tell(MatrixUpdate::Syncing(syncing));
                }
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.done(done).await,
                    // It panicked, and may have been the snapshot.
                    Err(_) => self.is_reading = false,
                },
                () = wait_until(due) => self.start_snapshot(),
            }
        }
    }

    fn tell(&mut self, update: MatrixUpdate) {
        let Err(mpsc::error::TrySendError::Full(update)) = self.tx.try_send(update) else { return };
        match update {
            MatrixUpdate::RoomChanged => self.owed.room_changed = true,
            MatrixUpdate::Syncing(syncing) => self.owed.syncing = Some(syncing),
            _ => tracing::warn!("the call does not keep up with the homeserver: an update was dropped"),
        }
    }

    fn take(&mut self, news: News) {
        for event in news.events {
            if self.seen.is_first_sight(&event.event_id) {
                self.tell(MatrixUpdate::Event(event));
            }
        }
        if news.changed {
            self.tell(MatrixUpdate::RoomChanged);
        }
    }

    fn snapshot_again(&mut self, pause: Duration) {
        let earliest = self.last_snapshot.map(|last| last + SNAPSHOT_PAUSE);
        let at = (Instant::now() + pause).max(earliest.unwrap_or_else(Instant::now));
        self.snapshot_at = Some(self.snapshot_at.map_or(at, |due| due.min(at)));
    }

    fn start_snapshot(&mut self) {
        (self.snapshot_at, self.is_reading) = (None, true);
        self.last_snapshot = Some(Instant::now());
        let inner = self.inner.clone();
        self.jobs.spawn(async move {
            // Held meanwhile, so that `room_view` waits for this snapshot instead of taking another.
            let mut is_loaded = inner.is_loaded.lock().await;
            let taken = inner.snapshot().await;
            *is_loaded |= taken.is_ok();
            Done::Snapshot(taken)
        });
    }

    fn start_jobs(&mut self) {
        while self.jobs.len() < MOST_JOBS
            && let Some(event_id) = self.to_fetch.pop_front()
        {
            let inner = self.inner.clone();
            self.jobs.spawn(async move {
                let fetched = inner.fetch(&event_id).await;
                Done::Fetched(event_id, fetched)
            });
        }
    }

    async fn done(&mut self, done: Done) {
        match done {
            Done::News(news) => self.take(news),
            Done::Snapshot(taken) => {
                self.is_reading = false;
                match taken {
                    Ok(news) => {
                        self.snapshot_pause = SNAPSHOT_PAUSE;
                        self.take(news);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the sticky events of the room cannot be read; trying again");
                        self.snapshot_again(self.snapshot_pause);
                        self.snapshot_pause = (self.snapshot_pause * 2).min(LONGEST_SNAPSHOT_PAUSE);
                    }
                }
            }
            Done::Fetched(_, Ok(news)) => self.take(news),
            Done::Fetched(event_id, Err(error)) => {
                tracing::debug!(%event_id, %error, "a sticky event could not be fetched");
                self.snapshot_again(SNAPSHOT_PAUSE);
            }
            Done::Devices(user) => self.resolve_unknown(&user).await,
        }
    }

    async fn room_update(&mut self, update: RoomUpdate) {
        let RoomUpdate::Joined { updates, .. } = update else {
            return self.tell(MatrixUpdate::RoomChanged);
        };
        let received = now();
        let mut news = News { changed: has_state(&updates), events: Vec::new() };
        if updates.timeline.limited || is_bare(&updates) {
            self.snapshot_again(Duration::ZERO);
        }
        for event in &updates.timeline.events {
            match &event.kind {
                TimelineEventKind::PlainText { event } | TimelineEventKind::UnableToDecrypt { event, .. } => {
                    news.add(self.inner.take_in(event.json().get(), received).await);
                }
                TimelineEventKind::Decrypted(event) => {
                    let json = event.event.json();
                    match self.inner.take_in_decrypted(json, &event.encryption_info, received).await {
                        Ok(more) => news.add(more),
                        Err(event_id) if self.to_fetch.len() < QUEUE => self.to_fetch.push_back(event_id),
                        Err(_) => self.snapshot_again(SNAPSHOT_PAUSE),
                    }
                }
            }
        }
        self.take(news);
    }

    async fn users_changed(&mut self, users: BTreeSet<OwnedUserId>) {
        let joined = self.inner.room.joined_user_ids().await.unwrap_or_default();
        let joined: HashSet<_> = joined.into_iter().collect();
        let mut is_changed = false;
        for user in users.into_iter().filter(|user| joined.contains(user)) {
            is_changed |= self.inner.learn_devices(&user).await;
            self.resolve_unknown(&user).await;
            self.tell(MatrixUpdate::TrustChanged { user_id: user });
        }
        if is_changed {
            self.tell(MatrixUpdate::RoomChanged);
        }
    }

    fn hear(&mut self, Heard { json, info }: Heard) {
        let Some((event, sender_key)) = to_device_event(&json, info) else { return };
        self.tell(MatrixUpdate::ToDevice(event.clone()));
        if let Some(sender_key) = sender_key {
            let now = Instant::now();
            self.unknown.retain(|unknown| now - unknown.since < UNKNOWN_PATIENCE);
            if self.unknown.len() >= MOST_UNKNOWN {
                self.unknown.pop_front();
            }
            let user = event.sender.clone();
            self.unknown.push_back(Unknown { event, sender_key, since: now });
            self.query_devices(user, now);
        }
    }

    fn query_devices(&mut self, user: OwnedUserId, now: Instant) {
        self.queried.retain(|_, at| now - *at < QUERY_PAUSE);
        if self.queried.contains_key(&user) || self.queried.len() >= MOST_UNKNOWN {
            return;
        }
        self.queried.insert(user.clone(), now);
        let encryption = self.inner.client().encryption();
        self.jobs.spawn(async move {
            let query = tokio::time::timeout(QUERY_LIMIT, encryption.request_user_identity(&user));
            match query.await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::debug!(%user, %error, "the devices of a sender could not be listed")
                }
                Err(_) => tracing::debug!(%user, "the devices of a sender were not listed in time"),
            }
            Done::Devices(user)
        });
    }

    /// Delivers the messages again whose device has become known, or turned out to be cross-signed.
    async fn resolve_unknown(&mut self, user: &OwnedUserId) {
        if !self.unknown.iter().any(|unknown| unknown.event.sender == *user) {
            return;
        }
        let encryption = self.inner.client().encryption();
        let Ok(devices) = encryption.get_user_devices(user).await else { return };
        let Ok(identity) = encryption.get_user_identity(user).await else { return };
        let is_trusted = !identity.is_some_and(|identity| identity.has_verification_violation());
        let devices: BTreeMap<String, _> = devices
            .devices()
            .filter_map(|device| Some((device.curve25519_key()?.to_base64(), device)))
            .collect();
        for unknown in std::mem::take(&mut self.unknown) {
            match devices.get(&unknown.sender_key) {
                Some(device) if unknown.event.sender == *user => {
                    let olm = OlmSender {
                        device_id: Some(device.device_id().to_owned()),
                        cross_signed: is_trusted && device.is_cross_signed_by_owner(),
                    };
                    let olm = Some(olm);
                    if olm != unknown.event.olm {
                        self.tell(MatrixUpdate::ToDevice(ToDeviceEvent { olm, ..unknown.event }));
                    }
                }
                _ => self.unknown.push_back(unknown),
            }
        }
    }
}

fn hear_to_device(inner: &Inner, heard: mpsc::Sender<Heard>) -> EventHandlerDropGuard {
    let client = inner.client();
    // The sync waits for handlers: this one only passes on.
    let handler = move |raw: Raw<AnyToDeviceEvent>, info: Option<EncryptionInfo>| {
        let json = raw.json().get();
        let event_type = raw.get_field::<String>("type").ok().flatten();
        if event_type.is_some_and(|event_type| events::is_to_device(&event_type, json.len()))
            && heard.try_send(Heard { json: json.to_owned(), info }).is_err()
        {
            tracing::warn!("the call does not keep up with the homeserver: a to-device message was dropped");
        }
        async {}
    };
    let handle = client.add_event_handler(handler);
    client.event_handler_drop_guard(handle)
}

/// Reads a to-device message. Its sender is taken from Olm, never from the content. With it comes the key of its Olm
/// session, if the device is not known or not known as cross-signed: a device that is in no list of ours may describe
/// itself in the message (MSC4147), and then counts as unsigned.
fn to_device_event(json: &str, info: Option<EncryptionInfo>) -> Option<(ToDeviceEvent, Option<String>)> {
    #[derive(Deserialize)]
    struct Envelope {
        #[serde(rename = "type")]
        event_type: String,
        sender: OwnedUserId,
        content: Value,
    }
    let envelope: Envelope = serde_json::from_str(json).ok()?;
    let mut unknown_key = None;
    let olm = info.and_then(|info| {
        let AlgorithmInfo::OlmV1Curve25519AesSha2 { curve25519_public_key_base64: key } = info.algorithm_info
        else {
            return None;
        };
        // Olm's word about the sender must agree with the event's.
        if info.sender != envelope.sender {
            return None;
        }
        let is_unsigned = matches!(
            info.verification_state,
            VerificationState::Unverified(VerificationLevel::UnsignedDevice)
        );
        if info.sender_device.is_none() || is_unsigned {
            unknown_key = Some(key);
        }
        let cross_signed = matches!(
            info.verification_state,
            VerificationState::Verified
                | VerificationState::Unverified(VerificationLevel::UnverifiedIdentity)
        );
        Some(OlmSender { device_id: info.sender_device, cross_signed })
    });
    let Envelope { event_type, sender, content } = envelope;
    Some((ToDeviceEvent { event_type, content, sender, olm }, unknown_key))
}

/// Users whose devices or identity changed.
async fn changed_users(
    encryption: &matrix_sdk::encryption::Encryption,
) -> stream::BoxStream<'static, BTreeSet<OwnedUserId>> {
    let devices = optional(encryption.devices_stream().await.ok());
    let identities = optional(encryption.user_identities_stream().await.ok());
    let devices = devices.map(|update| update.new.into_keys().chain(update.changed.into_keys()).collect());
    let identities =
        identities.map(|update| update.new.into_keys().chain(update.changed.into_keys()).collect());
    stream::select(devices, identities).boxed()
}

/// Megolm sessions of the room whose keys came; `None` if some were missed.
async fn room_keys(inner: &Inner) -> stream::BoxStream<'static, Option<HashSet<String>>> {
    let room = inner.room.room_id().to_owned();
    let keys = optional(inner.client().encryption().room_keys_received_stream().await);
    let of_room = keys.filter_map(move |keys| {
        let sessions = keys.ok().map(|keys| {
            let of_room = keys.into_iter().filter(|key| key.room_id == room);
            of_room.map(|key| key.session_id).collect::<HashSet<_>>()
        });
        std::future::ready((sessions != Some(HashSet::new())).then_some(sessions))
    });
    of_room.boxed()
}

/// A stream that is missing never yields.
fn optional<S: Stream>(stream: Option<S>) -> impl Stream<Item = S::Item> {
    stream::iter(stream).flatten().chain(stream::pending())
}

fn next_change(syncing: &mut Option<tokio::sync::watch::Receiver<bool>>) -> BoxFuture<'_, bool> {
    async move {
        if let Some(receiver) = syncing
            && receiver.changed().await.is_ok()
        {
            return *receiver.borrow_and_update();
        }
        std::future::pending().await
    }
    .boxed()
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep(at.saturating_duration_since(Instant::now())).await,
        None => std::future::pending().await,
    }
}

fn has_state(update: &JoinedRoomUpdate) -> bool {
    let (State::Before(state) | State::After(state)) = &update.state;
    let is_state = |event: &matrix_sdk::deserialized_responses::TimelineEvent| {
        matches!(&event.kind, TimelineEventKind::PlainText { event }
            if WireEvent::parse(event.json().get()).is_some_and(|event| event.state_key.is_some()))
    };
    !state.is_empty() || update.timeline.events.iter().any(is_state)
}

/// Nothing that matrix-sdk passes on, yet the room was in the answer: it may have held sticky events only.
fn is_bare(update: &JoinedRoomUpdate) -> bool {
    let (State::Before(state) | State::After(state)) = &update.state;
    state.is_empty()
        && update.timeline.events.is_empty()
        && update.account_data.is_empty()
        && update.ephemeral.is_empty()
}

#[cfg(test)]
mod tests {
    use matrix_sdk::ruma::user_id;
    use serde_json::json;

    use super::*;

    fn info(sender: &str, device: Option<&str>, state: VerificationState) -> EncryptionInfo {
        EncryptionInfo {
            sender: sender.try_into().unwrap(),
            sender_device: device.map(Into::into),
            forwarder: None,
            algorithm_info: AlgorithmInfo::OlmV1Curve25519AesSha2 {
                curve25519_public_key_base64: "key".to_owned(),
            },
            verification_state: state,
        }
    }

    fn read(info: Option<EncryptionInfo>) -> (Option<OlmSender>, Option<String>) {
        let json = json!({"type": "m.call.invite", "sender": "@a:x", "content": {"device_id": "CLAIMED"}});
        let (event, key) = to_device_event(&json.to_string(), info).unwrap();
        assert_eq!(event.sender, user_id!("@a:x"));
        (event.olm, key)
    }

    #[test]
    fn device_and_trust_come_from_olm() {
        let signed = VerificationState::Unverified(VerificationLevel::UnverifiedIdentity);
        let (olm, key) = read(Some(info("@a:x", Some("DEV"), signed.clone())));
        assert_eq!(olm, Some(OlmSender { device_id: Some("DEV".into()), cross_signed: true }));
        assert_eq!(key, None);
        let unsigned = VerificationState::Unverified(VerificationLevel::UnsignedDevice);
        let (olm, key) = read(Some(info("@a:x", Some("DEV"), unsigned)));
        assert!(!olm.unwrap().cross_signed);
        assert_eq!(key.as_deref(), Some("key"), "its list may be missing");
        let changed = VerificationState::Unverified(VerificationLevel::VerificationViolation);
        assert!(!read(Some(info("@a:x", Some("DEV"), changed))).0.unwrap().cross_signed);
        assert_eq!(read(None), (None, None), "in clear");
        assert_eq!(read(Some(info("@m:x", Some("DEV"), signed))), (None, None), "another's session");
    }

    #[test]
    fn unknown_device_is_left_open_with_its_key() {
        use matrix_sdk::deserialized_responses::DeviceLinkProblem;
        let state = VerificationState::Unverified(VerificationLevel::None(DeviceLinkProblem::MissingDevice));
        let (olm, key) = read(Some(info("@a:x", None, state)));
        assert_eq!(olm, Some(OlmSender { device_id: None, cross_signed: false }));
        assert_eq!(key.as_deref(), Some("key"));
    }

    #[test]
    fn an_event_is_handed_out_once() {
        let mut seen = Seen::default();
        let id = |n: usize| OwnedEventId::try_from(format!("$e{n}")).unwrap();
        assert!(seen.is_first_sight(&id(0)));
        assert!(!seen.is_first_sight(&id(0)));
        for n in 1..=MOST_SEEN {
            seen.is_first_sight(&id(n));
        }
        assert_eq!((seen.ids.len(), seen.order.len()), (MOST_SEEN, MOST_SEEN));
    }
}
