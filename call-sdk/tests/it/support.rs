//! Members of ours on a real homeserver, whose media keys can be read and whose SFU follows the test.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_call_sdk::{
    Call, CallEvent, CallEvents, CallOptions, ConnectFailure, Connected, Connector, Device, LiveKitFocus,
    LocalTrackId, Member, MembershipMode, OwnTrust, ParticipantIdentity, RemoteTrack, Session,
    SessionOptions, Subscription, TrackSid, TrackSource, TrackSpec, TrustPolicy,
    foci::{AccessRequest, AddressRule, Endpoint, Purpose, SfuAccess},
    machine::AccessWanted,
    matrix::{
        DelayId, Delivery, Jwt, MatrixError, MatrixPort, MatrixReply, MatrixRequest, MatrixUpdate,
        RequestError, RoomView, ServerSupport, ToDeviceBatch, sdk::SdkRoom,
    },
    transport::{
        DataPacket, DisconnectReason, FrameReceiver, MediaTransport, NamedBy, Outlet, TransportError,
        TransportEvent, WireFrame,
    },
};
use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use matrix_sdk::{
    RoomMemberships, RoomState,
    ruma::{
        OwnedRoomId, OwnedServerName, RoomId,
        api::client::room::create_room,
        events::{AnyInitialStateEvent, room::power_levels::RoomPowerLevelsEventContent},
        serde::Raw,
    },
};
use serde_json::{Value, json};
use tokio::sync::{MutexGuard, mpsc, watch};

/// Where every member says that it publishes. Nothing listens there.
pub(crate) const SERVICE: &str = "http://127.0.0.1:9/jwt";

static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Waits for this test's turn: homeservers and a dozen clients leave no room for a second test on two cores.
pub(crate) async fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().await
}

/// Polls `reached` until it is true; panics after `limit` with `told`.
pub(crate) async fn until(what: &str, limit: Duration, mut reached: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !reached().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(limit, waiting).await.is_ok(), "not {what} within {limit:?}");
}

/// A media key on its way to or from a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TappedKey {
    pub(crate) user: String,
    pub(crate) index: u8,
    pub(crate) bytes: Vec<u8>,
    /// Of a key of ours: the users that it was sent to.
    pub(crate) to: BTreeSet<String>,
}

/// The media keys that went through a port, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub(crate) received: Vec<TappedKey>,
    pub(crate) sent: Vec<TappedKey>,
}

impl Keys {
    pub(crate) fn of(&self, user: &str, index: u8) -> Option<&TappedKey> {
        self.received.iter().rev().find(|key| key.user == user && key.index == index)
    }

    pub(crate) fn own(&self, index: u8) -> Option<&TappedKey> {
        self.sent.iter().rev().find(|key| key.index == index)
    }
}

/// [`SdkRoom`] with a tap for media keys on it.
#[derive(Debug)]
struct KeyTap {
    inner: SdkRoom,
    keys: Arc<watch::Sender<Keys>>,
    /// While set, key messages to us are lost on the way.
    deaf: watch::Receiver<bool>,
}

fn key_in(event_type: &str, content: &Value, user: String, to: BTreeSet<String>) -> Option<TappedKey> {
    (event_type == "io.element.call.encryption_keys").then_some(())?;
    let index = u8::try_from(content["keys"]["index"].as_u64()?).ok()?;
    // matrix-js-sdk writes no padding.
    let text = content["keys"]["key"].as_str()?.trim_end_matches('=');
    let bytes = STANDARD_NO_PAD.decode(text).ok()?;
    Some(TappedKey { user, index, bytes, to })
}

#[async_trait]
impl MatrixPort for KeyTap {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn room_id(&self) -> &RoomId {
        self.inner.room_id()
    }

    fn trust(&self) -> TrustPolicy {
        self.inner.trust()
    }

    async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
        self.inner.own_trust().await
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        self.inner.room_view().await
    }

    async fn perform(&self, request: MatrixRequest, timeout: Duration) -> Result<MatrixReply, RequestError> {
        self.inner.perform(request, timeout).await
    }

    async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: mpsc::Sender<(Device, Delivery)>) {
        let to = batch.recipients.iter().map(|device| device.user_id.to_string()).collect();
        let user = self.device().user_id.to_string();
        if let Some(key) = key_in(&batch.event_type, &batch.content, user, to) {
            self.keys.send_modify(|keys| keys.sent.push(key));
        }
        self.inner.send_to_device(batch, outcomes).await;
    }

    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
        let mut from = self.inner.updates().await;
        let (tx, rx) = mpsc::channel(64);
        let (keys, deaf) = (self.keys.clone(), self.deaf.clone());
        tokio::spawn(async move {
            while let Some(update) = from.recv().await {
                if let MatrixUpdate::ToDevice(event) = &update
                    && let Some(key) =
                        key_in(&event.event_type, &event.content, event.sender.to_string(), BTreeSet::new())
                {
                    if *deaf.borrow() {
                        continue;
                    }
                    keys.send_modify(|keys| keys.received.push(key));
                }
                if tx.send(update).await.is_err() {
                    return;
                }
            }
        });
        rx
    }
}

/// An SFU that everybody can enter and that carries nothing, but says what the test wants.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeSfu {
    rooms: Arc<Mutex<Vec<mpsc::Sender<TransportEvent>>>>,
}

impl FakeSfu {
    /// Announces a microphone of this participant to the members in every room. No frame of it ever comes.
    pub(crate) async fn announce(&self, identity: &ParticipantIdentity) {
        let rooms = self.rooms.lock().unwrap().clone();
        for room in rooms {
            let track = RemoteTrack::new(TrackSid("TR_silent".to_owned()), TrackSource::Microphone);
            // A room whose connection is closed needs to be told nothing.
            let _ = room.send(TransportEvent::TrackUpdated { identity: identity.clone(), track }).await;
        }
    }
}

#[async_trait]
impl Connector for FakeSfu {
    async fn discover(
        &self,
        _port: &dyn MatrixPort,
        _support: &ServerSupport,
        _members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure> {
        Ok(vec![(LiveKitFocus::of_service(SERVICE.parse().unwrap()), NamedBy::Homeserver)])
    }

    async fn access(
        &self,
        port: &dyn MatrixPort,
        wanted: &AccessWanted,
    ) -> Result<SfuAccess, ConnectFailure> {
        let sfu = "ws://127.0.0.1:9";
        Ok(SfuAccess {
            request: AccessRequest {
                focus: wanted.focus.clone(),
                named_by: wanted.named_by.clone(),
                slot: wanted.slot.clone(),
                member_id: wanted.member_id.clone(),
                purpose: if wanted.ours { Purpose::Publish(wanted.mode) } else { Purpose::Subscribe },
            },
            sfu: sfu.parse().unwrap(),
            url: sfu.to_owned(),
            jwt: Jwt("token".to_owned()),
            identity: ParticipantIdentity::of_device(&port.device().user_id, &port.device().device_id),
            room: None,
            may_publish: true,
            issued_by: Endpoint::SfuGet,
            addresses: AddressRule::Any,
        })
    }

    async fn connect(&self, _access: &SfuAccess) -> Result<Connected, ConnectFailure> {
        let (events, receiver) = mpsc::channel(64);
        self.rooms.lock().unwrap().push(events.clone());
        Ok((Arc::new(FakeRoom { events }), receiver))
    }

    async fn delegate_leave(
        &self,
        _port: &dyn MatrixPort,
        _access: &SfuAccess,
        _delay_id: &DelayId,
        _delay: Duration,
    ) -> Result<(), RequestError> {
        Err(RequestError::Unsupported)
    }
}

#[derive(Debug)]
struct FakeRoom {
    events: mpsc::Sender<TransportEvent>,
}

#[derive(Debug)]
struct Nowhere;

impl Outlet for Nowhere {
    fn send(&self, _frame: &WireFrame) {}

    fn dropped(&self) -> u64 {
        0
    }
}

#[async_trait]
impl MediaTransport for FakeRoom {
    async fn publish(
        &self,
        _track: LocalTrackId,
        _spec: TrackSpec,
        _encrypted: bool,
    ) -> Result<Arc<dyn Outlet>, TransportError> {
        Ok(Arc::new(Nowhere))
    }

    fn unpublish(&self, _track: LocalTrackId) {}

    fn set_muted(&self, _track: LocalTrackId, _muted: bool) {}

    fn attach(&self, _sid: &TrackSid, _receiver: Option<Arc<dyn FrameReceiver>>) {}

    fn subscribe(&self, _sid: &TrackSid, _subscription: Subscription) {}

    fn request_key_frame(&self, _sid: &TrackSid) {}

    fn send_data(&self, _packet: DataPacket) -> Result<(), TransportError> {
        Ok(())
    }

    async fn close(&self) {
        // The call may have stopped listening.
        let _ = self.events.send(TransportEvent::Disconnected(DisconnectReason::Closed)).await;
    }
}

/// Logs a user with the password `pw` in; the device lasts as long as the folder.
pub(crate) async fn log_in(homeserver: &str, user: &str) -> (Session, tempfile::TempDir) {
    let store = tempfile::tempdir().unwrap();
    let options = SessionOptions::new(homeserver.parse().unwrap(), user, "pw", store.path().join("device"));
    (Session::log_in_or_restore(options).await.unwrap(), store)
}

/// Makes an encrypted room that anybody may join and whose members may all join its call, and enters it.
pub(crate) async fn create_call_room(creator: &Session) -> OwnedRoomId {
    let encryption = json!({ "type": "m.room.encryption", "state_key": "",
        "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let levels = json!({ "events": { "org.matrix.msc3401.call.member": 0 } }).to_string();
    let mut request = create_room::v3::Request::new();
    request.preset = Some(create_room::v3::RoomPreset::PublicChat);
    request.initial_state =
        vec![Raw::<AnyInitialStateEvent>::from_json_string(encryption.to_string()).unwrap()];
    request.power_level_content_override =
        Some(Raw::<RoomPowerLevelsEventContent>::from_json_string(levels).unwrap().cast_unchecked());
    let id = creator.client().create_room(request).await.unwrap().room_id().to_owned();
    enter(creator, &id, &[]).await;
    id
}

/// Enters a room and waits until it is known to be encrypted.
pub(crate) async fn enter(session: &Session, id: &RoomId, via: &[OwnedServerName]) {
    let client = session.client();
    client.join_room_by_id_or_alias(id.into(), via).await.unwrap();
    until("in the encrypted room", Duration::from_secs(20), async || {
        client
            .get_room(id)
            .is_some_and(|room| room.state() == RoomState::Joined && room.encryption_state().is_encrypted())
    })
    .await;
}

/// A device of ours that is logged in and in the room.
pub(crate) struct OurDevice {
    pub(crate) session: Session,
    room: OwnedRoomId,
    // Last: the folder must outlive the session.
    _store: tempfile::TempDir,
}

impl OurDevice {
    /// Logs a user with the password `pw` in and enters the room.
    pub(crate) async fn enter(homeserver: &str, user: &str, room: &str, via: &str) -> Self {
        let (session, store) = log_in(homeserver, user).await;
        let id = RoomId::parse(room).unwrap();
        enter(&session, &id, &[via.try_into().unwrap()]).await;
        Self { session, room: id, _store: store }
    }

    pub(crate) fn user(&self) -> String {
        self.session.client().user_id().unwrap().to_string()
    }

    pub(crate) fn device(&self) -> String {
        self.session.client().device_id().unwrap().to_string()
    }

    /// Waits until so many users are in the room: encrypted events are readable only to those that the sender knows.
    pub(crate) async fn sees_in_room(&self, users: usize) {
        let room = self.session.client().get_room(&self.room).unwrap();
        until("everybody in the room", Duration::from_secs(20), async || {
            room.members(RoomMemberships::JOIN).await.is_ok_and(|members| members.len() >= users)
        })
        .await;
    }

    /// Joins the call with a delayed leave of `leave_delay`.
    pub(crate) async fn join(self, mode: MembershipMode, leave_delay: Duration) -> OurMember {
        // matrix-js-sdk and Element Call on its own do not cross-sign their devices.
        let mut options = CallOptions::default().with_mode(mode).with_trust(TrustPolicy::AnyDevice);
        options.membership.leave_delay = leave_delay;
        options.membership.restart_interval = leave_delay / 4;
        let inner = self.session.room(&self.room, TrustPolicy::AnyDevice).unwrap();
        let (keys_tx, keys) = watch::channel(Keys::default());
        let (deafen, deaf) = watch::channel(false);
        let port = Arc::new(KeyTap { inner, keys: Arc::new(keys_tx), deaf });
        let sfu = FakeSfu::default();
        let (call, events) = Call::join_through(port, Arc::new(sfu.clone()), options).await.unwrap();
        OurMember { call, events: Events::of(events), keys, deafen, sfu, own: self }
    }
}

/// The events of a call, those that were passed over included.
pub(crate) struct Events {
    events: CallEvents,
    seen: Vec<String>,
}

impl Events {
    pub(crate) fn of(events: CallEvents) -> Self {
        Self { events, seen: Vec::new() }
    }

    /// Reads events until one satisfies `wanted`; panics after `limit` with what came instead.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&CallEvent) -> bool,
    ) -> CallEvent {
        let waiting = async {
            while let Some(event) = self.events.next().await {
                if !matches!(event, CallEvent::Frame { .. }) {
                    self.seen.push(format!("{event:?}"));
                }
                if wanted(&event) {
                    return Some(event);
                }
            }
            None
        };
        match tokio::time::timeout(limit, waiting).await {
            Ok(Some(event)) => event,
            Ok(None) => panic!("the call ended before {what}; events: {:#?}", self.seen),
            Err(_) => panic!("no {what} within {limit:?}; events: {:#?}", self.seen),
        }
    }
}

/// A device of ours in a call.
pub(crate) struct OurMember {
    pub(crate) call: Call,
    pub(crate) events: Events,
    pub(crate) keys: watch::Receiver<Keys>,
    /// While true, key messages to us are lost on the way.
    pub(crate) deafen: watch::Sender<bool>,
    pub(crate) sfu: FakeSfu,
    pub(crate) own: OurDevice,
}

impl OurMember {
    /// Awaits keys that satisfy `reached` and returns them; panics after `limit`.
    pub(crate) async fn until_keys(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&Keys) -> bool,
    ) -> Keys {
        let mut keys = self.keys.clone();
        let waited = tokio::time::timeout(limit, keys.wait_for(reached)).await;
        if let Ok(keys) = waited {
            return keys.unwrap().clone();
        }
        let sent: Vec<_> = self.keys.borrow().sent.iter().map(|key| (key.index, key.to.clone())).collect();
        let received: Vec<_> =
            self.keys.borrow().received.iter().map(|key| (key.index, key.user.clone())).collect();
        panic!("no {what} within {limit:?}; sent {sent:?}, received {received:?}");
    }

    /// Awaits that the other members are exactly these users, and returns them.
    pub(crate) async fn until_members(&self, limit: Duration, users: &[&str]) -> Arc<Vec<Member>> {
        let mut members = self.call.watch_members();
        let wanted: BTreeSet<&str> = users.iter().copied().collect();
        let reached = members.wait_for(|members| {
            members.iter().map(|member| member.user_id.as_str()).collect::<BTreeSet<_>>() == wanted
        });
        match tokio::time::timeout(limit, reached).await {
            Ok(members) => members.unwrap().clone(),
            Err(_) => panic!("not {users:?} within {limit:?}: {:#?}", self.call.members()),
        }
    }
}

/// A process of ours with one member: a runtime of its own, which ends as a crash does.
pub(crate) struct OurProcess {
    runtime: tokio::runtime::Runtime,
    whole: Box<dyn std::any::Any + Send>,
    pub(crate) user: String,
}

impl OurProcess {
    /// Starts a process whose member joins the call.
    pub(crate) async fn start(
        homeserver: String,
        user: &'static str,
        room: String,
        via: String,
        mode: MembershipMode,
        leave_delay: Duration,
    ) -> Self {
        let start = move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let member = runtime.block_on(async {
                let device = OurDevice::enter(&homeserver, user, &room, &via).await;
                device.sees_in_room(3).await;
                device.join(mode, leave_delay).await
            });
            let user = member.own.user();
            Self { runtime, whole: Box::new(member), user }
        };
        tokio::task::spawn_blocking(start).await.unwrap()
    }

    /// Stops every task at once, so that nothing says goodbye.
    pub(crate) fn kill(self) {
        self.runtime.shutdown_background();
        drop(self.whole);
    }
}
