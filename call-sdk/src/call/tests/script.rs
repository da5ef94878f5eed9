//! A homeserver and SFUs that follow a script: calls on virtual time, without a network.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use ruma_common::{RoomId, UserId, room_id};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{
    call::{Connected, Connector, shell::now},
    foci::{AccessRequest, AddressRule, Endpoint, Purpose, SfuAccess},
    frame_crypto::{FrameEncryptor, KeyRing},
    key::{KeyIndex, MediaKey},
    machine::{
        AccessWanted, ConnectFailure, ConnectFailureKind,
        media_keys::wire::{KeySender, messages},
        membership::wire::{
            MembershipMode, OwnDescription, OwnTransports, SLOT_TYPE, STICKY_TYPE, membership,
        },
        testing,
    },
    matrix::{
        ApiVersion, DelayId, DelayedAction, Delivery, EventTarget, EventWrite, Jwt, MatrixError, MatrixPort,
        MatrixReply, MatrixRequest, MatrixUpdate, MemberEvent, OlmSender, OwnTrust, RequestError, RoomView,
        ServerSupport, SlotEvent, ToDeviceBatch, ToDeviceEvent, TrustPolicy,
    },
    media::{Codec, TrackSource, TrackSpec},
    member::{Device, Member, MemberId, MembershipForm, ParticipantIdentity, Slot},
    time::UnixMillis,
    transport::{
        DataPacket, FrameReceiver, LiveKitFocus, LocalTrackId, MediaTransport, NamedBy, Outlet,
        ReceivedFrame, RemoteTrack, Subscription, TrackSid, TransportError, TransportEvent, WireFrame,
    },
};

/// The room as everybody sees it, and everything that our side asked of the homeserver.
#[derive(Debug)]
pub(super) struct Homeserver {
    pub(super) view: RoomView,
    pub(super) requests: Vec<MatrixRequest>,
    pub(super) keys: Vec<(Vec<Device>, Value)>,
    /// The homeserver answers nothing but errors.
    pub(super) down: bool,
    /// The room cannot be read this many times.
    pub(super) unreadable: usize,
    /// It fails this many times to say what it supports.
    pub(super) silent_about_support: usize,
    updates: Option<mpsc::Sender<MatrixUpdate>>,
    events: usize,
}

/// Our device's view of the script.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) server: Arc<Mutex<Homeserver>>,
    device: Device,
    pub(super) trusted: OwnTrust,
}

pub(super) fn focus(name: &str) -> LiveKitFocus {
    testing::focus(&format!("https://{name}.example"))
}

impl Script {
    pub(super) fn new(encrypted: bool) -> Self {
        let device = testing::device("@alice:example.org", "ALICE");
        let mut view = RoomView { encrypted, version: "11".to_owned(), ..RoomView::default() };
        view.joined.insert(device.user_id.clone());
        let server = Homeserver {
            view,
            requests: Vec::new(),
            keys: Vec::new(),
            down: false,
            silent_about_support: 0,
            unreadable: 0,
            updates: None,
            events: 0,
        };
        Self { server: Arc::new(Mutex::new(server)), device, trusted: OwnTrust::CrossSigned }
    }

    /// A member publishes its membership.
    pub(super) fn join(&self, user: &str, device: &str, at: &LiveKitFocus) -> ParticipantIdentity {
        let device = testing::device(user, device);
        let event = membership_of(&device, at);
        let mut server = self.server.lock().unwrap();
        server.view.joined.insert(device.user_id.clone());
        server.write(&device, event);
        ParticipantIdentity::of_device(&device.user_id, &device.device_id)
    }

    /// A member's membership is gone.
    pub(super) fn leave(&self, user: &str) {
        let mut server = self.server.lock().unwrap();
        server.view.members.retain(|event| event.sender != user);
        server.tell(MatrixUpdate::RoomChanged);
    }

    pub(super) fn encrypt_room(&self) {
        let mut server = self.server.lock().unwrap();
        server.view.encrypted = true;
        server.tell(MatrixUpdate::RoomChanged);
    }

    /// A key message comes from a member's device, Olm-encrypted if `olm`.
    pub(super) fn key(&self, user: &str, device: &str, key: &MediaKey, olm: bool) {
        let device = testing::device(user, device);
        let sender = KeySender {
            room_id: self.room_id().to_owned(),
            slot: Slot::room_call(),
            member_id: MemberId::of_state_member(&device.user_id, &device.device_id),
            device: device.clone(),
        };
        let (event_type, content) = messages(&sender, KeyIndex(0), key, now().unix).legacy;
        let event = ToDeviceEvent {
            event_type: event_type.to_owned(),
            content,
            sender: device.user_id,
            olm: olm.then_some(OlmSender { device_id: Some(device.device_id), cross_signed: true }),
        };
        self.server.lock().unwrap().tell(MatrixUpdate::ToDevice(event));
    }

    pub(super) fn is_listed(&self, user: &str) -> bool {
        self.server.lock().unwrap().view.members.iter().any(|event| event.sender == user)
    }
}

impl Homeserver {
    fn tell(&mut self, update: MatrixUpdate) {
        if let Some(updates) = &self.updates {
            updates.try_send(update).unwrap();
        }
    }

    fn write(&mut self, device: &Device, event: EventWrite) -> ruma_common::OwnedEventId {
        self.events += 1;
        let event_id: ruma_common::OwnedEventId = format!("${}", self.events).try_into().unwrap();
        let sent = now().unix;
        if let (SLOT_TYPE, EventTarget::State { key }) = (&*event.event_type, &event.target) {
            self.view.slots.retain(|slot| slot.slot_id != *key);
            self.view.slots.push(SlotEvent { slot_id: key.clone(), content: event.content });
            self.tell(MatrixUpdate::RoomChanged);
            return event_id;
        }
        let (form, state_key, sticky_until) = match event.target {
            EventTarget::State { key } => (MembershipForm::State, Some(key), None),
            EventTarget::Message { sticky: Some(sticky) } if event.event_type == STICKY_TYPE => {
                (MembershipForm::Sticky, None, Some(sent.plus(sticky)))
            }
            _ => return event_id,
        };
        self.view.members.retain(|known| match form {
            MembershipForm::State => known.state_key != state_key,
            MembershipForm::Sticky => known.content["sticky_key"] != event.content["sticky_key"],
        });
        if event.content.as_object().is_some_and(|content| !content.is_empty()) {
            let is_sticky = form == MembershipForm::Sticky;
            self.view.members.push(MemberEvent {
                form,
                sender: device.user_id.clone(),
                sender_device: is_sticky.then(|| device.device_id.clone()),
                encrypted: is_sticky && self.view.encrypted,
                state_key,
                event_id: Some(event_id.clone()),
                origin_server_ts: sent,
                content: event.content,
                sticky_until,
                sticky_rank: sticky_until.unwrap_or(UnixMillis(0)),
                redacted_by: None,
            });
        }
        self.tell(MatrixUpdate::RoomChanged);
        event_id
    }
}

fn membership_of(device: &Device, at: &LiveKitFocus) -> EventWrite {
    let description = OwnDescription {
        device: device.clone(),
        room_id: room_id!("!room:example.org").to_owned(),
        room_version: "11".to_owned(),
        slot: Slot::room_call(),
        mode: MembershipMode::Compatibility,
        member_id: MemberId::of_state_member(&device.user_id, &device.device_id),
        transports: OwnTransports { focus: Some(at.clone()), mesh: None },
        intent: None,
    };
    membership(&description, Duration::from_secs(4 * 3600), None)
}

#[async_trait]
impl MatrixPort for Script {
    fn device(&self) -> &Device {
        &self.device
    }

    fn room_id(&self) -> &RoomId {
        room_id!("!room:example.org")
    }

    fn trust(&self) -> TrustPolicy {
        TrustPolicy::CrossSigned
    }

    async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
        Ok(self.trusted.clone())
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        let mut server = self.server.lock().unwrap();
        if server.unreadable > 0 {
            server.unreadable -= 1;
            return Err(MatrixError::NotLoggedIn);
        }
        Ok(server.view.clone())
    }

    async fn perform(&self, request: MatrixRequest, _timeout: Duration) -> Result<MatrixReply, RequestError> {
        let mut server = self.server.lock().unwrap();
        server.requests.push(request.clone());
        if server.down {
            return Err(RequestError::Network { cause: "connection refused".to_owned() });
        }
        Ok(match request {
            MatrixRequest::ReadSupport if server.silent_about_support > 0 => {
                server.silent_about_support -= 1;
                return Err(RequestError::Network { cause: "502".to_owned() });
            }
            MatrixRequest::ReadSupport => {
                let delayed_events = Some(ApiVersion::Unstable);
                let support = ServerSupport { delayed_events, ..ServerSupport::default() };
                MatrixReply::Support(ServerSupport { sticky_events: true, ..support })
            }
            MatrixRequest::Schedule(_) => MatrixReply::Scheduled { delay_id: DelayId("delay".to_owned()) },
            MatrixRequest::Send(event) => MatrixReply::Sent { event_id: server.write(&self.device, event) },
            MatrixRequest::UpdateDelayed { action: DelayedAction::Send, .. } => {
                server.view.members.retain(|event| event.sender != self.device.user_id);
                server.tell(MatrixUpdate::RoomChanged);
                MatrixReply::Done
            }
            _ => MatrixReply::Done,
        })
    }

    async fn send_to_device(&self, batch: ToDeviceBatch, outcomes: mpsc::Sender<(Device, Delivery)>) {
        for device in &batch.recipients {
            outcomes.send((device.clone(), Ok(()))).await.unwrap();
        }
        self.server.lock().unwrap().keys.push((batch.recipients, batch.content));
    }

    async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
        let (sender, receiver) = mpsc::channel(256);
        self.server.lock().unwrap().updates = Some(sender);
        receiver
    }
}

/// SFUs; the test holds the other end of each connection.
#[derive(Debug, Default)]
pub(super) struct Sfus {
    rooms: Mutex<Vec<(LiveKitFocus, Arc<Room>)>>,
    pub(super) closed: AtomicUsize,
    /// Connecting fails with this.
    pub(super) refuse: Mutex<Option<ConnectFailure>>,
    /// Closing takes for ever.
    pub(super) hangs: Mutex<bool>,
    /// Who issues the tokens, and so derives our identity. `None`: `/sfu/get`.
    pub(super) issuer: Mutex<Option<Endpoint>>,
    /// The focus that never answers a request for a token.
    pub(super) silent: Mutex<Option<LiveKitFocus>>,
}

/// One connection, from the SFU's side.
#[derive(Debug)]
pub(super) struct Room {
    events: mpsc::Sender<TransportEvent>,
    receivers: Mutex<HashMap<TrackSid, Arc<dyn FrameReceiver>>>,
    pub(super) sent: Mutex<Vec<WireFrame>>,
    pub(super) published: Mutex<Vec<LocalTrackId>>,
    publish_waits: tokio::sync::Semaphore,
}

impl Sfus {
    /// The newest connection to a focus, once there is one.
    pub(super) async fn room(&self, at: &LiveKitFocus) -> Arc<Room> {
        loop {
            if let Some((_, room)) = self.rooms.lock().unwrap().iter().rev().find(|(focus, _)| focus == at) {
                return room.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.rooms.lock().unwrap().len()
    }
}

impl Room {
    pub(super) async fn tell(&self, event: TransportEvent) {
        self.events.send(event).await.unwrap();
    }

    /// The SFU announces an Opus track of a participant.
    pub(super) async fn announce(&self, identity: &ParticipantIdentity) -> TrackSid {
        let sid = TrackSid(format!("TR_{}", identity.0));
        let mut track = RemoteTrack::new(sid.clone(), TrackSource::Microphone);
        track.codec = Some(Codec::Opus);
        self.tell(TransportEvent::TrackUpdated { identity: identity.clone(), track }).await;
        sid
    }

    /// A frame of a track arrives; false if nobody takes it.
    pub(super) fn frame(&self, sid: &TrackSid, key: Option<&MediaKey>, plain: &[u8]) -> bool {
        let payload = match key {
            None => plain.to_vec(),
            Some(key) => {
                let ring = KeyRing::new();
                ring.set(KeyIndex(0), key).unwrap();
                let mut out = Vec::new();
                FrameEncryptor::new(Codec::Opus, ring).unwrap().seal(KeyIndex(0), plain, &mut out).unwrap();
                out
            }
        };
        let receiver = self.receivers.lock().unwrap().get(sid).cloned();
        let now = now().instant;
        let frame = ReceivedFrame { now, codec: Codec::Opus, rtp_timestamp: 0, payload: &payload };
        receiver.map(|receiver| receiver.receive(frame)).is_some()
    }

    /// The same, once somebody takes frames of the track.
    pub(super) async fn frame_when_attached(&self, sid: &TrackSid, key: Option<&MediaKey>, plain: &[u8]) {
        while !self.frame(sid, key, plain) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// From now on publishing waits until [`Self::let_publish`].
    pub(super) fn hold_publishing(&self) {
        self.publish_waits.forget_permits(usize::MAX >> 4);
    }

    pub(super) fn let_publish(&self) {
        self.publish_waits.add_permits(8);
    }
}

/// [`Connector`] is implemented for a handle, as the test keeps the SFUs.
#[derive(Debug)]
pub(super) struct Dial(pub(super) Arc<Sfus>, pub(super) Vec<LiveKitFocus>);

#[async_trait]
impl Connector for Dial {
    async fn discover(
        &self,
        _port: &dyn MatrixPort,
        _support: &ServerSupport,
        _members: &[Member],
    ) -> Result<Vec<(LiveKitFocus, NamedBy)>, ConnectFailure> {
        Ok(self.1.iter().map(|focus| (focus.clone(), NamedBy::Homeserver)).collect())
    }

    async fn access(
        &self,
        port: &dyn MatrixPort,
        wanted: &AccessWanted,
    ) -> Result<SfuAccess, ConnectFailure> {
        let is_silent = self.0.silent.lock().unwrap().as_ref() == Some(&wanted.focus);
        if is_silent {
            std::future::pending::<()>().await;
        }
        let Device { user_id, device_id } = port.device();
        let issued_by = self.0.issuer.lock().unwrap().unwrap_or(Endpoint::SfuGet);
        let identity = match issued_by {
            Endpoint::Homeserver(_) => ParticipantIdentity::of_member(user_id, &wanted.member_id),
            Endpoint::GetToken => {
                ParticipantIdentity::of_claimed_device(user_id, device_id, &wanted.member_id)
            }
            Endpoint::SfuGet => ParticipantIdentity::of_device(user_id, device_id),
        };
        let LiveKitFocus { service, sfu } = &wanted.focus;
        let url = match (service, sfu) {
            (Some(service), _) => service.as_str().replace("https", "wss"),
            (None, sfu) => sfu.as_ref().unwrap().to_string(),
        };
        Ok(SfuAccess {
            request: AccessRequest {
                focus: wanted.focus.clone(),
                named_by: wanted.named_by.clone(),
                slot: wanted.slot.clone(),
                member_id: wanted.member_id.clone(),
                purpose: if wanted.ours { Purpose::Publish(wanted.mode) } else { Purpose::Subscribe },
            },
            sfu: url.parse().unwrap(),
            url,
            jwt: Jwt("token".to_owned()),
            identity,
            room: None,
            may_publish: true,
            issued_by,
            addresses: AddressRule::Any,
        })
    }

    async fn connect(&self, access: &SfuAccess) -> Result<Connected, ConnectFailure> {
        if let Some(failure) = self.0.refuse.lock().unwrap().clone() {
            return Err(failure);
        }
        let (events, receiver) = mpsc::channel(256);
        let room = Arc::new(Room {
            events,
            receivers: Mutex::default(),
            sent: Mutex::default(),
            published: Mutex::default(),
            publish_waits: tokio::sync::Semaphore::new(1024),
        });
        self.0.rooms.lock().unwrap().push((access.request.focus.clone(), room.clone()));
        Ok((Arc::new(Wire { room, sfus: self.0.clone() }), receiver))
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

pub(super) fn lost(kind: ConnectFailureKind) -> ConnectFailure {
    ConnectFailure::new(kind, "the script says so")
}

#[derive(Debug)]
struct Wire {
    room: Arc<Room>,
    sfus: Arc<Sfus>,
}

#[derive(Debug)]
struct Way(Arc<Room>);

impl Outlet for Way {
    fn send(&self, frame: &WireFrame) {
        self.0.sent.lock().unwrap().push(frame.clone());
    }

    fn dropped(&self) -> u64 {
        0
    }
}

#[async_trait]
impl MediaTransport for Wire {
    async fn publish(
        &self,
        track: LocalTrackId,
        _spec: TrackSpec,
        _encrypted: bool,
    ) -> Result<Arc<dyn Outlet>, TransportError> {
        let _permit = self.room.publish_waits.acquire().await.unwrap();
        self.room.published.lock().unwrap().push(track);
        Ok(Arc::new(Way(self.room.clone())))
    }

    fn unpublish(&self, track: LocalTrackId) {
        self.room.published.lock().unwrap().retain(|known| *known != track);
    }

    fn set_muted(&self, _track: LocalTrackId, _muted: bool) {}

    fn attach(&self, sid: &TrackSid, receiver: Option<Arc<dyn FrameReceiver>>) {
        let mut receivers = self.room.receivers.lock().unwrap();
        match receiver {
            // The real one keeps feeding a receiver for a moment after it was detached, and so does this.
            None => {}
            Some(receiver) => drop(receivers.insert(sid.clone(), receiver)),
        }
    }

    fn subscribe(&self, _sid: &TrackSid, _subscription: Subscription) {}

    fn request_key_frame(&self, _sid: &TrackSid) {}

    fn send_data(&self, _packet: DataPacket) -> Result<(), TransportError> {
        Ok(())
    }

    async fn close(&self) {
        if *self.sfus.hangs.lock().unwrap() {
            std::future::pending::<()>().await;
        }
        self.sfus.closed.fetch_add(1, Ordering::Relaxed);
        // As the real one: the end is told, whoever asked for it.
        let gone = TransportEvent::Disconnected(crate::transport::DisconnectReason::Closed);
        let _ = self.room.events.send(gone).await;
    }
}

pub(super) fn user(id: &str) -> &UserId {
    <&UserId>::try_from(id).unwrap()
}
