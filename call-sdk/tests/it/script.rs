//! A homeserver and an SFU that follow a script: calls on virtual time, without a network.
#![allow(clippy::disallowed_methods, reason = "a homeserver stamps its events with the wall clock")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use antiphon_call_sdk::{
    call::{ConnectError, Connected, Connector},
    frame_crypto::{FrameEncryptor, KeyRing},
    key::{KeyIndex, MediaKey},
    matrix::{KeySendError, MatrixError, MatrixPort, MemberDevice, OpenIdToken, RoomFacts, RoomView, Update},
    media::{Codec, TrackSpec},
    media_keys::{
        inbox::{OlmSender, ReceivedKey},
        wire::{KeySender, content},
    },
    member::{LiveKitFocus, MemberId, MembershipKind, ParticipantIdentity, Slot},
    membership::{
        own::{Reply, Request, RequestError},
        wire::{MemberEvent, OwnDescription, state_content, state_key},
    },
    time::UnixMillis,
    transport::{LocalTrackId, MediaTransport, TrackSid, TransportError, TransportEvent, WireFrame},
};
use matrix_sdk::{
    async_trait,
    ruma::{DeviceId, OwnedDeviceId, OwnedUserId, RoomId, UserId, room_id},
};
use serde_json::Value;
use tokio::sync::mpsc;

/// The room as everybody sees it, and everything that our side asked of the homeserver.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) encrypted: bool,
    pub(crate) view: RoomView,
    pub(crate) requests: Vec<Request>,
    pub(crate) keys: Vec<(Vec<MemberDevice>, Value)>,
    updates: Option<mpsc::Sender<Update>>,
}

/// One device's view of the script.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) world: Arc<Mutex<World>>,
    user: OwnedUserId,
    device: OwnedDeviceId,
    focus: LiveKitFocus,
}

pub(crate) fn focus(name: &str) -> LiveKitFocus {
    LiveKitFocus { service_url: format!("https://{name}.example") }
}

impl Script {
    pub(crate) fn new(encrypted: bool) -> Self {
        let world = World {
            encrypted,
            view: RoomView::default(),
            requests: Vec::new(),
            keys: Vec::new(),
            updates: None,
        };
        let user = OwnedUserId::try_from("@alice:example.org").unwrap();
        let device = OwnedDeviceId::from("ALICE");
        Self { world: Arc::new(Mutex::new(world)), user, device, focus: focus("own") }
    }

    /// A member publishes its membership.
    pub(crate) fn join(&self, user: &str, device: &str, at: &LiveKitFocus) -> ParticipantIdentity {
        let user = OwnedUserId::try_from(user).unwrap();
        let device = OwnedDeviceId::from(device);
        let event = membership(&user, &device, at);
        let mut world = self.world.lock().unwrap();
        world.view.joined.insert(user.clone());
        world.view.events.push(event);
        world.changed();
        ParticipantIdentity::of_state_member(&user, &device)
    }

    /// A member's membership is gone.
    pub(crate) fn leave(&self, user: &str) {
        let mut world = self.world.lock().unwrap();
        world.view.events.retain(|e| e.sender != user);
        world.changed();
    }

    /// A key message comes from a member's device, Olm-encrypted if `olm`.
    pub(crate) fn key(&self, user: &str, device: &str, key: &MediaKey, olm: bool) {
        let sender = KeySender {
            room_id: self.room_id().to_owned(),
            slot: Slot::room_call(),
            device_id: device.into(),
            member_id: MemberId(format!("{user}:{device}")),
        };
        let received = ReceivedKey {
            content: content(&sender, KeyIndex(0), key, now()),
            sender: OwnedUserId::try_from(user).unwrap(),
            olm: olm.then(|| OlmSender { device_id: Some(device.into()), cross_signed: true }),
        };
        self.world.lock().unwrap().tell(Update::Key(received));
    }
}

impl World {
    fn changed(&mut self) {
        self.tell(Update::RoomChanged);
    }

    fn tell(&mut self, update: Update) {
        if let Some(updates) = &self.updates {
            updates.try_send(update).unwrap();
        }
    }
}

fn now() -> UnixMillis {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(unix.as_millis()).unwrap())
}

fn membership(user: &UserId, device: &DeviceId, at: &LiveKitFocus) -> MemberEvent {
    let description = OwnDescription {
        user_id: user.to_owned(),
        device_id: device.to_owned(),
        slot: Slot::room_call(),
        focus: at.clone(),
        room_id: room_id!("!room:example.org").to_owned(),
        intent: None,
    };
    MemberEvent {
        kind: MembershipKind::State,
        sender: user.to_owned(),
        sender_device: None,
        state_key: Some(state_key(user, device, &Slot::room_call(), "11")),
        event_id: Some(format!("${user}")),
        origin_server_ts: now(),
        content: state_content(&description, Duration::from_secs(4 * 3600), None),
        sticky_until: None,
    }
}

#[async_trait]
impl MatrixPort for Script {
    fn user_id(&self) -> &UserId {
        &self.user
    }

    fn device_id(&self) -> &DeviceId {
        &self.device
    }

    fn room_id(&self) -> &RoomId {
        room_id!("!room:example.org")
    }

    async fn room_facts(&self) -> Result<RoomFacts, MatrixError> {
        Ok(RoomFacts { encrypted: self.world.lock().unwrap().encrypted, version: "11".to_owned() })
    }

    async fn room_view(&self) -> Result<RoomView, MatrixError> {
        Ok(self.world.lock().unwrap().view.clone())
    }

    async fn membership_request(
        &self,
        _state_key: &str,
        request: Request,
        _timeout: Duration,
    ) -> Result<Reply, RequestError> {
        let mut world = self.world.lock().unwrap();
        let reply = match &request {
            Request::ScheduleLeave { .. } => Reply::Scheduled { delay_id: "delay".to_owned() },
            Request::PutMembership { .. } => {
                world.view.joined.insert(self.user.clone());
                let event = membership(&self.user, &self.device, &self.focus);
                world.view.events.retain(|e| e.sender != self.user);
                world.view.events.push(event);
                world.changed();
                Reply::Done
            }
            Request::SendLeave { .. } | Request::PutLeave => {
                world.view.events.retain(|e| e.sender != self.user);
                world.changed();
                Reply::Done
            }
            Request::ReadMaxDelay => Reply::MaxDelay(None),
            _ => Reply::Done,
        };
        world.requests.push(request);
        Ok(reply)
    }

    async fn send_key(
        &self,
        recipients: &[MemberDevice],
        content: Value,
    ) -> Result<Vec<MemberDevice>, KeySendError> {
        self.world.lock().unwrap().keys.push((recipients.to_vec(), content));
        Ok(Vec::new())
    }

    async fn openid_token(&self) -> Result<OpenIdToken, MatrixError> {
        Err(MatrixError::NotLoggedIn)
    }

    async fn livekit_foci(&self) -> Result<Vec<LiveKitFocus>, MatrixError> {
        Ok(vec![self.focus.clone()])
    }

    async fn updates(&self) -> mpsc::Receiver<Update> {
        let (tx, rx) = mpsc::channel(256);
        self.world.lock().unwrap().updates = Some(tx);
        rx
    }
}

/// SFUs by focus; the test holds the other end of each connection.
#[derive(Debug, Default)]
pub(crate) struct Sfus {
    rooms: Mutex<Vec<(LiveKitFocus, mpsc::Sender<TransportEvent>)>>,
    pub(crate) sent: Arc<Mutex<Vec<WireFrame>>>,
    pub(crate) closed: Arc<Mutex<usize>>,
}

impl Sfus {
    /// The newest connection to a focus, once there is one.
    pub(crate) async fn room(&self, at: &LiveKitFocus) -> mpsc::Sender<TransportEvent> {
        loop {
            if let Some((_, tx)) = self.rooms.lock().unwrap().iter().rev().find(|(f, _)| f == at) {
                return tx.clone();
            }
            tokio::task::yield_now().await;
        }
    }
}

/// [`Connector`] is implemented for a handle, as the test keeps the SFUs.
#[derive(Debug)]
pub(crate) struct Dial(pub(crate) Arc<Sfus>);

#[async_trait]
impl Connector for Dial {
    async fn connect(&self, focus: &LiveKitFocus, _port: &dyn MatrixPort) -> Result<Connected, ConnectError> {
        let (tx, rx) = mpsc::channel(256);
        self.0.rooms.lock().unwrap().push((focus.clone(), tx));
        Ok((Arc::new(Wire { sent: self.0.sent.clone(), closed: self.0.closed.clone() }), rx))
    }
}

#[derive(Debug)]
struct Wire {
    sent: Arc<Mutex<Vec<WireFrame>>>,
    closed: Arc<Mutex<usize>>,
}

#[async_trait]
impl MediaTransport for Wire {
    async fn publish(&self, _spec: TrackSpec, _encrypted: bool) -> Result<LocalTrackId, TransportError> {
        Ok(LocalTrackId(1))
    }

    async fn unpublish(&self, _track: LocalTrackId) {}

    async fn set_muted(&self, _track: LocalTrackId, _muted: bool) {}

    async fn send(&self, _track: LocalTrackId, frame: WireFrame) -> Result<(), TransportError> {
        self.sent.lock().unwrap().push(frame);
        Ok(())
    }

    async fn request_key_frame(&self, _sid: &TrackSid) {}

    async fn close(&self) {
        *self.closed.lock().unwrap() += 1;
    }
}

/// An Opus frame of a participant, sealed with a key at index 0, or in clear.
pub(crate) fn frame(
    identity: &ParticipantIdentity,
    key: Option<&MediaKey>,
    plain: &'static [u8],
) -> TransportEvent {
    let payload = match key {
        None => bytes::Bytes::from_static(plain),
        Some(key) => {
            let ring = KeyRing::new();
            ring.set(KeyIndex(0), key).unwrap();
            let mut out = Vec::new();
            FrameEncryptor::new(Codec::Opus, ring).unwrap().seal(KeyIndex(0), plain, &mut out).unwrap();
            out.into()
        }
    };
    TransportEvent::Frame {
        identity: identity.clone(),
        sid: TrackSid(format!("TR_{}", identity.0)),
        codec: Codec::Opus,
        frame: WireFrame { payload, rtp_timestamp: 0 },
    }
}
