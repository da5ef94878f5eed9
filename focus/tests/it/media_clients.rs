//! Browser-like clients for the media plane: str0m as a full ICE peer over loopback UDP.
//!
//! Every client's socket and the plane's events feed one channel, so a test waits for what happens and never
//! for time to pass.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "this is the clients' shell: it owns the clock and the tasks")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use antiphon_focus::plane::{
    Channel, Command, Event, MediaPlane, OfferedSection, PeerId, PeerRole, PlaneConfig, TrackKey,
};
use str0m::change::{SdpAnswer, SdpOffer};
use str0m::channel::ChannelId;
use str0m::format::Codec;
use str0m::media::{Direction, MediaKind, Mid, Rid, Simulcast, SimulcastLayer};
use str0m::net::{Protocol, Receive};
use str0m::rtp::{ExtensionValues, RtpPacket, RtpWrite};
use str0m::{Candidate, Input, Output, Rtc, RtcConfig};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// Nothing on loopback takes this long, not even in a debug build on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

enum Happened {
    Datagram(PeerId, SocketAddr, Vec<u8>),
    Plane(Option<Event>),
}

/// Says which datagrams are lost.
type Loss = Box<dyn FnMut(&[u8]) -> bool>;

/// A plane and its clients.
pub(crate) struct World {
    pub(crate) plane: MediaPlane,
    pub(crate) clients: HashMap<PeerId, Client>,
    /// Events that the world does not handle itself.
    pub(crate) events: Vec<Event>,
    inbox: mpsc::Receiver<Happened>,
    to_inbox: mpsc::Sender<Happened>,
}

/// One peer connection of a client.
pub(crate) struct Client {
    pub(crate) rtc: Rtc,
    pub(crate) connected: bool,
    pub(crate) packets: Vec<(Mid, RtpPacket)>,
    pub(crate) messages: Vec<(String, Vec<u8>)>,
    pub(crate) key_frame_requests: Vec<(Mid, Option<Rid>)>,
    pub(crate) channels: HashMap<String, ChannelId>,
    pub(crate) sections: Vec<OfferedSection>,
    pub(crate) offers: Vec<(String, Vec<(String, TrackKey)>)>,
    pub(crate) answers: Vec<String>,
    /// Datagrams from the plane that never arrive.
    pub(crate) lose: Loss,
    /// Datagrams to the plane that never arrive.
    pub(crate) lose_sent: Loss,
    pub(crate) socket: Arc<UdpSocket>,
    address: SocketAddr,
    pending: Option<str0m::change::SdpPendingOffer>,
    next: Instant,
}

impl World {
    pub(crate) fn new() -> Self {
        let (plane, mut events) =
            MediaPlane::start(PlaneConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
        let (to_inbox, inbox) = mpsc::channel(10_000);
        let forward = to_inbox.clone();
        tokio::spawn(async move {
            loop {
                let event = events.recv().await;
                let ended = event.is_none();
                if forward.send(Happened::Plane(event)).await.is_err() || ended {
                    return;
                }
            }
        });
        Self { plane, clients: HashMap::new(), events: vec![], inbox, to_inbox }
    }

    pub(crate) fn command(&self, command: Command) {
        self.plane.try_send(command).unwrap();
    }

    /// A client's peer connection and the plane's end of it.
    pub(crate) async fn connect(&mut self, id: u64, role: PeerRole) -> PeerId {
        let peer = PeerId(id);
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let (reader, inbox) = (Arc::clone(&socket), self.to_inbox.clone());
        tokio::spawn(async move {
            let mut buffer = [0; 2000];
            while let Ok((length, source)) = reader.recv_from(&mut buffer).await {
                let datagram = Happened::Datagram(peer, source, buffer[..length].to_vec());
                if inbox.send(datagram).await.is_err() {
                    return;
                }
            }
        });
        let mut rtc = RtcConfig::new().set_rtp_mode(true).build(Instant::now());
        rtc.add_local_candidate(Candidate::host(address, "udp").unwrap());
        let client = Client {
            rtc,
            connected: false,
            packets: vec![],
            messages: vec![],
            key_frame_requests: vec![],
            channels: HashMap::new(),
            sections: vec![],
            offers: vec![],
            answers: vec![],
            lose: Box::new(|_| false),
            lose_sent: Box::new(|_| false),
            socket,
            address,
            pending: None,
            next: Instant::now(),
        };
        self.clients.insert(peer, client);
        self.command(Command::AddPeer { peer, role });
        peer
    }

    pub(crate) fn client(&mut self, peer: PeerId) -> &mut Client {
        self.clients.get_mut(&peer).unwrap()
    }

    /// A publisher with the data channels of livekit-client, an Opus and a VP8 section; connected.
    pub(crate) async fn publisher(&mut self, id: u64, rids: &[&str]) -> Published {
        let peer = self.connect(id, PeerRole::Publisher).await;
        let simulcast = (!rids.is_empty()).then(|| Simulcast {
            send: rids.iter().map(|rid| SimulcastLayer { rid: Rid::from(*rid), attributes: None }).collect(),
            recv: vec![],
        });
        let (mut audio, mut video) = (None, None);
        self.offer(peer, |api| {
            api.add_channel("_reliable".to_owned());
            api.add_channel("_lossy".to_owned());
            let name = |n: &str| Some(n.to_owned());
            audio = Some(api.add_media(MediaKind::Audio, Direction::SendOnly, name("s"), name("mic"), None));
            video = Some(api.add_media(
                MediaKind::Video,
                Direction::SendOnly,
                name("s"),
                name("camera"),
                simulcast,
            ));
        });
        self.until("the publisher to connect", |w| {
            let client = &w.clients[&peer];
            client.connected && client.channels.len() == 2
        })
        .await;
        let published = Published {
            peer,
            audio: audio.unwrap(),
            video: video.unwrap(),
            audio_track: TrackKey(id * 10),
            video_track: TrackKey(id * 10 + 1),
            sounds: 0,
            pictures: HashMap::new(),
        };
        self.command(Command::Publish {
            peer,
            mid: published.audio.to_string(),
            track: published.audio_track,
            kind: antiphon_focus::plane::MediaKind::Audio,
            rids: vec![],
        });
        self.command(Command::Publish {
            peer,
            mid: published.video.to_string(),
            track: published.video_track,
            kind: antiphon_focus::plane::MediaKind::Video,
            rids: rids.iter().map(|rid| (*rid).to_owned()).collect(),
        });
        published
    }

    /// A connected subscriber without tracks.
    pub(crate) async fn subscriber(&mut self, id: u64) -> PeerId {
        let peer = self.connect(id, PeerRole::Subscriber).await;
        self.until("the subscriber to connect", |w| {
            let client = &w.clients[&peer];
            client.connected && client.channels.len() == 2
        })
        .await;
        peer
    }

    /// Subscribes to both tracks of a publisher and waits until they are negotiated.
    pub(crate) async fn subscribe(&mut self, peer: PeerId, tracks: &[TrackKey]) {
        for track in tracks {
            self.command(Command::Subscribe {
                peer,
                track: *track,
                stream_id: format!("PA_x|TR_{}", track.0),
                track_id: format!("TR_{}", track.0),
            });
        }
        self.until("the tracks to be offered", |w| {
            let offers = &w.clients[&peer].offers;
            offers
                .last()
                .is_some_and(|(_, mids)| tracks.iter().all(|track| mids.iter().any(|(_, t)| t == track)))
        })
        .await;
    }

    /// Changes a publisher's session and sends the offer.
    pub(crate) fn offer(&mut self, peer: PeerId, change: impl FnOnce(&mut str0m::change::SdpApi<'_>)) {
        let client = self.clients.get_mut(&peer).unwrap();
        let mut api = client.rtc.sdp_api();
        change(&mut api);
        let (offer, pending) = api.apply().unwrap();
        client.pending = Some(pending);
        self.plane.try_send(Command::ApplyOffer { peer, sdp: offer.to_sdp_string() }).unwrap();
    }

    /// Runs everybody until `done`.
    pub(crate) async fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.drive();
            if done(self) {
                return;
            }
            let next = self.clients.values().map(|client| client.next).min();
            // The plane's counters ring no bell, so they are looked at now and then.
            let look = Instant::now() + Duration::from_millis(5);
            let next = next.map_or(look, |next| next.min(look));
            assert!(Instant::now() < deadline, "waited in vain for {what}; events: {:?}", self.events);
            let Ok(happened) = tokio::time::timeout_at(next.into(), self.inbox.recv()).await else {
                continue;
            };
            match happened.unwrap() {
                Happened::Datagram(peer, source, datagram) => self.receive(peer, source, &datagram),
                Happened::Plane(event) => self.on_event(event.expect("the plane stopped")),
            }
        }
    }

    fn receive(&mut self, peer: PeerId, source: SocketAddr, datagram: &[u8]) {
        let Some(client) = self.clients.get_mut(&peer) else { return };
        if (client.lose)(datagram) {
            return;
        }
        if let Ok(receive) = Receive::new(Protocol::Udp, source, client.address, datagram) {
            client.rtc.handle_input(Input::Receive(Instant::now(), receive)).unwrap();
            client.drain();
        }
    }

    /// Sends what clients have written and lets their time pass.
    pub(crate) fn drive(&mut self) {
        for client in self.clients.values_mut() {
            client.rtc.handle_input(Input::Timeout(Instant::now())).unwrap();
            client.drain();
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            // A peer without a client is the test's own affair.
            Event::Answered { peer, .. } | Event::Offer { peer, .. } if !self.clients.contains_key(&peer) => {
                self.events.push(event);
            }
            Event::Answered { peer, sdp, sections } => {
                let client = self.clients.get_mut(&peer).unwrap();
                client.sections = sections;
                client.answers.push(sdp.clone());
                let answer = SdpAnswer::from_sdp_string(&sdp).unwrap();
                let pending = client.pending.take().unwrap();
                client.rtc.sdp_api().accept_answer(pending, answer).unwrap();
            }
            Event::Offer { peer, sdp, mids } => {
                let client = self.clients.get_mut(&peer).unwrap();
                let offer = SdpOffer::from_sdp_string(&sdp).unwrap();
                client.offers.push((sdp, mids));
                let answer = client.rtc.sdp_api().accept_offer(offer).unwrap();
                self.plane.try_send(Command::ApplyAnswer { peer, sdp: answer.to_sdp_string() }).unwrap();
            }
            other => self.events.push(other),
        }
    }
}

impl Client {
    fn drain(&mut self) {
        loop {
            match self.rtc.poll_output().unwrap() {
                Output::Timeout(next) => {
                    self.next = next.max(Instant::now() + Duration::from_millis(1));
                    return;
                }
                Output::Transmit(t) if (self.lose_sent)(&t.contents) => {}
                Output::Transmit(t) => {
                    self.socket.try_send_to(&t.contents, t.destination).unwrap();
                }
                Output::Event(event) => self.on_event(event),
            }
        }
    }

    fn on_event(&mut self, event: str0m::Event) {
        match event {
            str0m::Event::Connected => self.connected = true,
            str0m::Event::ChannelOpen(id, label) => {
                self.channels.insert(label, id);
            }
            str0m::Event::ChannelData(data) => {
                let label = self.channels.iter().find(|(_, id)| **id == data.id).unwrap().0.clone();
                self.messages.push((label, data.data));
            }
            str0m::Event::KeyframeRequest(request) => {
                self.key_frame_requests.push((request.mid, request.rid));
            }
            str0m::Event::RtpPacket(packet) => {
                let mid = self.rtc.direct_api().stream_rx(&packet.header.ssrc).unwrap().mid();
                self.packets.push((mid, packet));
            }
            _ => {}
        }
    }

    /// The packets of a section, in the order of their numbers.
    pub(crate) fn received(&self, mid: &str) -> Vec<&RtpPacket> {
        let mut packets: Vec<_> =
            self.packets.iter().filter(|(of, _)| &**of == mid).map(|(_, packet)| packet).collect();
        packets.sort_by_key(|packet| packet.seq_no);
        packets
    }

    /// The section that carries a track, by the last offer.
    pub(crate) fn mid_of(&self, track: TrackKey) -> String {
        self.offers.last().unwrap().1.iter().find(|(_, t)| *t == track).unwrap().0.clone()
    }

    pub(crate) fn send(&mut self, label: &str, message: &[u8]) {
        let id = self.channels[label];
        assert!(self.rtc.channel(id).unwrap().write(true, message).unwrap());
    }
}

/// What a publisher publishes.
pub(crate) struct Published {
    pub(crate) peer: PeerId,
    pub(crate) audio: Mid,
    pub(crate) video: Mid,
    pub(crate) audio_track: TrackKey,
    pub(crate) video_track: TrackKey,
    sounds: u64,
    pictures: HashMap<Option<String>, u64>,
}

impl Published {
    /// Sends the next Opus packet; returns its payload.
    pub(crate) fn speak(&mut self, world: &mut World, level: i8) -> Vec<u8> {
        self.sounds += 1;
        let payload = format!("sealed sound {}", self.sounds).into_bytes();
        let client = world.client(self.peer);
        let pt = payload_type(&client.rtc, Codec::Opus);
        let stream = client.rtc.direct_api().stream_tx_by_mid(self.audio, None).unwrap().ssrc();
        let extensions =
            ExtensionValues { audio_level: Some(level), voice_activity: Some(true), ..Default::default() };
        let mut api = client.rtc.direct_api();
        api.stream_tx(&stream).unwrap().write_rtp(
            RtpWrite::new(
                pt,
                (1000 + self.sounds).into(),
                960 * self.sounds as u32,
                Instant::now(),
                payload.clone(),
            )
            .ext_vals(extensions),
        );
        world.drive();
        payload
    }

    /// Sends a VP8 frame of two packets on a layer; returns the bytes behind the descriptors.
    pub(crate) fn show(&mut self, world: &mut World, rid: Option<&str>, key: bool) -> Vec<Vec<u8>> {
        let number = self.pictures.entry(rid.map(str::to_owned)).or_default();
        *number += 1;
        let number = *number;
        let client = world.client(self.peer);
        let pt = payload_type(&client.rtc, Codec::Vp8);
        let mut sealed = vec![];
        for part in 0..2u8 {
            let mut frame = vec![u8::from(!key), 0x9d, part];
            frame.extend(format!("sealed picture {number} {rid:?}").into_bytes());
            let [high, low] = ((number as u16) & 0x7fff).to_be_bytes();
            let first = if part == 0 { 0x90 } else { 0x80 };
            let mut payload = vec![first, 0xe0, 0x80 | high, low, number as u8, 0x20];
            payload.extend(&frame);
            sealed.push(frame);
            let mut api = client.rtc.direct_api();
            let stream = api.stream_tx_by_mid(self.video, rid.map(Rid::from)).unwrap();
            let sequence = 60_000 + 2 * number + u64::from(part);
            stream.write_rtp(
                RtpWrite::new(pt, sequence.into(), 3000 * number as u32, Instant::now(), payload)
                    .marker(part == 1)
                    .nackable(true),
            );
        }
        world.drive();
        sealed
    }
}

fn payload_type(rtc: &Rtc, codec: Codec) -> str0m::media::Pt {
    rtc.codec_config().params().iter().find(|p| p.spec().codec == codec).unwrap().pt()
}

/// The bytes behind the VP8 descriptor that [`Published::show`] writes.
pub(crate) fn sealed(packet: &RtpPacket) -> Vec<u8> {
    packet.payload[6..].to_vec()
}

/// Whether a datagram is an RTP packet of VP8 (payload type 96 in the plane's offers).
pub(crate) fn is_vp8(datagram: &[u8]) -> bool {
    datagram.len() > 12 && (128..192).contains(&datagram[0]) && datagram[1] & 0x7f == 96
}

/// Whether a message arrived.
pub(crate) fn has_data(events: &[Event], from: PeerId, on: Channel, message: &[u8]) -> bool {
    events.iter().any(|event| {
        matches!(event, Event::Data { peer, channel, payload }
            if *peer == from && *channel == on && payload[..] == *message)
    })
}
