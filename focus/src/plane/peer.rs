//! One peer connection on str0m, in RTP mode.
//!
//! Everything here runs under the engine's `catch_unwind`: whatever the underlying engine does with a client's
//! bytes, it costs that client its peer and nobody else anything.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::channel::{ChannelConfig, ChannelId, Reliability};
use str0m::config::DtlsVersion;
use str0m::format::Codec;
use str0m::media::{Direction, KeyframeRequestKind, Mid, Pt, Rid};
use str0m::net::DatagramSend;
use str0m::rtp::{Extension, ExtensionMap, ExtensionValues, RtpPacket, RtpWrite, Ssrc};
use str0m::{Candidate, IceConnectionState, Input, Output, Rtc, RtcConfig};
use thiserror::Error;

use super::forward::{Downtrack, Incoming, Outgoing};
use super::{Channel, Event, MediaKind, OfferedSection, PeerId, PeerRole, TrackKey};
use crate::sdp::{self, Media, SdpError};

/// A peer must be connected this long after its first description.
const CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// Bytes that may wait for one data channel.
const CHANNEL_QUEUE: usize = 1 << 20;
/// The message size that we announce and accept, as LiveKit does.
const MAX_MESSAGE: u32 = 65_535;
/// Packets kept for retransmission, per stream.
const VIDEO_CACHE: usize = 500;
/// How long they are kept.
const CACHE_AGE: Duration = Duration::from_secs(3);
/// Retransmissions stop when they make up more than this share of what a stream sends: a subscriber must not
/// multiply its own traffic.
const RTX_SHARE: Option<f32> = Some(0.5);
/// Sections of a subscriber's session. The engine cannot reuse one for another track, so a subscriber that has
/// seen this many tracks come and go must begin a new session.
const MAX_SECTIONS: usize = 250;

/// What peers want of the world: filled by [`Peer::drive`], emptied by the engine.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) transmits: VecDeque<(SocketAddr, DatagramSend)>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) media: VecDeque<(PeerId, RtpPacket)>,
    /// Subscribers that lost the picture, and the section where.
    pub(crate) key_frames: Vec<(PeerId, Mid)>,
}

/// Why a peer cannot go on, or a description cannot be used.
#[derive(Debug, Error)]
pub(crate) enum PeerError {
    /// The engine gave up.
    #[error("the peer connection failed: {0}")]
    Engine(#[from] str0m::RtcError),
    /// ICE went silent.
    #[error("no packet came from the client for 15 s")]
    Silent,
    /// The client closed DTLS.
    #[error("the client closed the connection")]
    Closed,
    /// Nothing happened for [`CONNECT_WITHIN`].
    #[error("the client did not connect within 60 s")]
    NeverConnected,
    /// A `_reliable` message could not be kept for the client.
    #[error("the client takes its data too slowly: more than 1 MiB waits on _reliable")]
    SlowReceiver,
    /// [`MAX_SECTIONS`].
    #[error("the client's session has had {MAX_SECTIONS} tracks: it must connect anew")]
    SessionFull,
    /// The description breaks a bound or a rule.
    #[error(transparent)]
    Sdp(#[from] SdpError),
    /// The description cannot be parsed.
    #[error("the session description cannot be parsed: {0}")]
    Syntax(#[from] str0m::error::SdpError),
    /// An answer that nobody asked for.
    #[error("there is no offer that this answer could answer")]
    NoOffer,
    /// An offer to a subscriber peer or an answer to a publisher peer.
    #[error("this side of the connection does not take such a description")]
    WrongRole,
}

/// A peer connection.
pub(crate) struct Peer {
    id: PeerId,
    role: PeerRole,
    rtc: Rtc,
    connected: bool,
    connect_by: Option<Instant>,
    channels: [Queue; 2],
    labels: HashMap<ChannelId, Channel>,
    /// Publisher: where each stream belongs.
    streams: HashMap<Ssrc, (Mid, Option<Rid>)>,
    /// Subscriber: what it receives or has received.
    sections: BTreeMap<TrackKey, Section>,
    pending: Option<SdpPendingOffer>,
    /// The data channels have been offered.
    opened: bool,
    /// The data channels and the transport have been agreed upon.
    negotiated: bool,
    /// The next offer begins a new ICE session.
    restart: bool,
    /// An answer failed half-way: the engine's view and the client's may differ from now on.
    broken: bool,
}

/// Messages for one data channel.
#[derive(Debug, Default)]
struct Queue {
    id: Option<ChannelId>,
    waiting: VecDeque<Bytes>,
    bytes: usize,
}

/// A section of a subscriber's session: one track, for ever.
struct Section {
    kind: MediaKind,
    stream_id: String,
    track_id: String,
    mid: Option<Mid>,
    wanted: bool,
    /// Whether the last offer had it on.
    offered: bool,
    /// Whether an answer has confirmed the section.
    negotiated: bool,
    route: Option<(Ssrc, Pt)>,
    cached: bool,
    downtrack: Downtrack,
}

impl Peer {
    /// A peer reachable at `candidates`.
    pub(crate) fn new(now: Instant, id: PeerId, role: PeerRole, candidates: &[Candidate]) -> Self {
        let extensions = match role {
            PeerRole::Publisher => ExtensionMap::standard(),
            // No congestion control towards subscribers yet: what only feeds one is left out.
            PeerRole::Subscriber => {
                let mut map = ExtensionMap::empty();
                map.set(4, Extension::RtpMid);
                map.set(13, Extension::VideoOrientation);
                map
            }
        };
        let mut rtc = RtcConfig::new()
            .set_rtp_mode(true)
            .set_ice_lite(true)
            .clear_codecs()
            .enable_opus(true, false)
            .enable_vp8(true)
            .set_extension_map(extensions)
            .set_dtls_version(DtlsVersion::Dtls12)
            .set_sctp_max_message_size(MAX_MESSAGE)
            .set_stats_interval(None)
            .build(now);
        for candidate in candidates {
            rtc.add_local_candidate(candidate.clone());
        }
        Self {
            id,
            role,
            rtc,
            connected: false,
            connect_by: (role == PeerRole::Subscriber).then(|| now + CONNECT_WITHIN),
            channels: Default::default(),
            labels: HashMap::new(),
            streams: HashMap::new(),
            sections: BTreeMap::new(),
            pending: None,
            opened: false,
            negotiated: false,
            restart: false,
            broken: false,
        }
    }

    /// Our ICE user name fragment.
    pub(crate) fn fragment(&mut self) -> String {
        self.rtc.direct_api().local_ice_credentials().ufrag
    }

    /// Whether a STUN request is meant for this peer and proves that its sender knows our password.
    pub(crate) fn authenticates(&self, input: &Input<'_>) -> bool {
        self.rtc.accepts(input)
    }

    /// Gives the engine an input and takes everything it has to say; returns when it wants to be driven again.
    pub(crate) fn drive(
        &mut self,
        now: Instant,
        input: Input<'_>,
        wishes: &mut Wishes,
    ) -> Result<Instant, PeerError> {
        self.rtc.handle_input(input)?;
        let mut next = self.drain(wishes)?;
        if self.write_channels() {
            self.rtc.handle_input(Input::Timeout(now))?;
            next = self.drain(wishes)?;
        }
        if !self.rtc.is_alive() {
            return Err(PeerError::Closed);
        }
        Ok(next)
    }

    /// Whether the peer has been given up waiting for.
    pub(crate) fn check(&self, now: Instant) -> Result<(), PeerError> {
        match self.connect_by {
            Some(by) if !self.connected && now >= by => Err(PeerError::NeverConnected),
            _ => Ok(()),
        }
    }

    fn drain(&mut self, wishes: &mut Wishes) -> Result<Instant, PeerError> {
        loop {
            match self.rtc.poll_output()? {
                Output::Timeout(next) => return Ok(next),
                Output::Transmit(t) => wishes.transmits.push_back((t.destination, t.contents)),
                Output::Event(event) => self.on_event(event, wishes)?,
            }
        }
    }

    fn on_event(&mut self, event: str0m::Event, wishes: &mut Wishes) -> Result<(), PeerError> {
        match event {
            str0m::Event::Connected if !self.connected => {
                self.connected = true;
                wishes.events.push_back(Event::Connected { peer: self.id });
            }
            str0m::Event::IceConnectionStateChange(IceConnectionState::Disconnected) if self.connected => {
                return Err(PeerError::Silent);
            }
            str0m::Event::Closed => return Err(PeerError::Closed),
            str0m::Event::ChannelOpen(id, label) => {
                let channel = match label.as_str() {
                    "_reliable" => Channel::Reliable,
                    "_lossy" => Channel::Lossy,
                    _ => return Ok(()),
                };
                self.labels.insert(id, channel);
                self.channels[slot(channel)].id = Some(id);
            }
            str0m::Event::ChannelClose(id) => {
                if let Some(channel) = self.labels.remove(&id) {
                    self.channels[slot(channel)].id = None;
                }
            }
            str0m::Event::ChannelData(data) => {
                if let Some(channel) = self.labels.get(&data.id) {
                    wishes.events.push_back(Event::Data {
                        peer: self.id,
                        channel: *channel,
                        payload: Bytes::from(data.data),
                    });
                }
            }
            str0m::Event::RtpPacket(packet) => wishes.media.push_back((self.id, packet)),
            str0m::Event::KeyframeRequest(request) => wishes.key_frames.push((self.id, request.mid)),
            _ => {}
        }
        Ok(())
    }
}

/// Data channels.
impl Peer {
    /// Queues a message. `Ok(false)` says that a `_lossy` message was dropped.
    pub(crate) fn send_data(&mut self, channel: Channel, payload: Bytes) -> Result<bool, PeerError> {
        let queue = &mut self.channels[slot(channel)];
        if queue.bytes + payload.len() > CHANNEL_QUEUE {
            return match channel {
                Channel::Lossy => Ok(false),
                Channel::Reliable => Err(PeerError::SlowReceiver),
            };
        }
        queue.bytes += payload.len();
        queue.waiting.push_back(payload);
        Ok(true)
    }

    /// Hands waiting messages to the engine as far as it takes them.
    fn write_channels(&mut self) -> bool {
        let mut wrote = false;
        for queue in &mut self.channels {
            let Some(id) = queue.id else { continue };
            while let Some(message) = queue.waiting.front() {
                let Some(mut channel) = self.rtc.channel(id) else { break };
                // An error says that this message can never be sent (too large for the client): it is dropped.
                if let Ok(false) = channel.write(true, message) {
                    break;
                }
                wrote = true;
                queue.bytes -= message.len();
                queue.waiting.pop_front();
            }
        }
        wrote
    }
}

fn slot(channel: Channel) -> usize {
    match channel {
        Channel::Reliable => 0,
        Channel::Lossy => 1,
    }
}

/// Publisher.
impl Peer {
    /// Answers a client's offer.
    pub(crate) fn answer(&mut self, now: Instant, offer: &str) -> Result<Event, PeerError> {
        if self.role != PeerRole::Publisher {
            return Err(PeerError::WrongRole);
        }
        let offered = sdp::sections(offer)?;
        let parsed = SdpOffer::from_sdp_string(&sdp::publisher_offer(offer))?;
        let answer = self.rtc.sdp_api().accept_offer(parsed)?;
        let answer = sdp::publisher_answer(&answer.to_sdp_string());
        let answered = sdp::sections(&answer)?;
        self.connect_by.get_or_insert(now + CONNECT_WITHIN);
        self.streams.clear();
        let sections = offered
            .into_iter()
            .filter_map(|section| {
                let kind = match section.media {
                    Media::Audio => MediaKind::Audio,
                    Media::Video => MediaKind::Video,
                    Media::Application | Media::Other => return None,
                };
                let ours = answered.iter().find(|ours| ours.mid == section.mid)?;
                Some(OfferedSection {
                    sends: section.direction.sends() && !section.rejected && !ours.rejected,
                    mid: section.mid,
                    kind,
                    track_id: section.track_id,
                    mimes: ours.mimes.clone(),
                    rids: section.rids,
                })
            })
            .collect();
        Ok(Event::Answered { peer: self.id, sdp: answer, sections })
    }

    /// The section and layer that a stream belongs to.
    pub(crate) fn stream(&mut self, ssrc: Ssrc) -> Option<(Mid, Option<Rid>)> {
        if let Some(known) = self.streams.get(&ssrc) {
            return Some(*known);
        }
        let mut api = self.rtc.direct_api();
        let stream = api.stream_rx(&ssrc)?;
        let known = (stream.mid(), stream.rid());
        self.streams.insert(ssrc, known);
        Some(known)
    }

    /// Asks the client for a key frame (RFC 4585 §6.3.1).
    pub(crate) fn request_key_frame(&mut self, mid: Mid, rid: Option<Rid>) {
        if let Some(stream) = self.rtc.direct_api().stream_rx_by_mid(mid, rid) {
            stream.request_keyframe(KeyframeRequestKind::Pli);
        }
    }
}

/// Subscriber.
impl Peer {
    /// Wants a track from now on. A track that comes back gets the section and the SSRC that it had; `stream_id`
    /// and `track_id` stay those of the first time.
    pub(crate) fn subscribe(
        &mut self,
        track: TrackKey,
        kind: MediaKind,
        stream_id: String,
        track_id: String,
    ) -> Result<(), PeerError> {
        if self.role != PeerRole::Subscriber {
            return Err(PeerError::WrongRole);
        }
        if !self.sections.contains_key(&track) && self.sections.len() >= MAX_SECTIONS {
            return Err(PeerError::SessionFull);
        }
        let section = self.sections.entry(track).or_insert_with(|| Section {
            kind,
            stream_id,
            track_id,
            mid: None,
            wanted: true,
            offered: false,
            negotiated: false,
            route: None,
            cached: false,
            downtrack: Downtrack::new(kind),
        });
        section.wanted = true;
        // It came back before the client was told that it had gone: nothing will be offered.
        if section.offered && section.negotiated {
            section.route = section.mid.and_then(|mid| route(&mut self.rtc, mid, section.kind));
        }
        Ok(())
    }

    /// No longer wants a track; returns whether that needs an offer.
    pub(crate) fn unsubscribe(&mut self, track: TrackKey) -> bool {
        let Some(section) = self.sections.get_mut(&track) else { return false };
        section.wanted = false;
        section.route = None;
        section.downtrack.interrupt();
        if section.mid.is_none() {
            self.sections.remove(&track);
            return false;
        }
        true
    }

    /// Pauses, resumes, limits.
    pub(crate) fn set_forwarding(&mut self, track: TrackKey, paused: bool, max_layer: u8) {
        if let Some(section) = self.sections.get_mut(&track) {
            section.downtrack.set(paused, max_layer);
        }
    }

    /// The next offer, if something changed and none waits for its answer.
    pub(crate) fn offer(&mut self) -> Option<Event> {
        if self.role != PeerRole::Subscriber || self.pending.is_some() || self.broken {
            return None;
        }
        let mut api = self.rtc.sdp_api();
        if std::mem::take(&mut self.restart) {
            api.ice_restart(true);
        }
        if !self.opened {
            api.add_channel("_reliable".to_owned());
            api.add_channel_with_config(ChannelConfig {
                label: "_lossy".to_owned(),
                ordered: false,
                reliability: Reliability::MaxRetransmits { retransmits: 0 },
                ..Default::default()
            });
            self.opened = true;
        }
        for section in self.sections.values_mut() {
            match section.mid {
                None => {
                    let kind = match section.kind {
                        MediaKind::Audio => str0m::media::MediaKind::Audio,
                        MediaKind::Video => str0m::media::MediaKind::Video,
                    };
                    section.mid = Some(api.add_media(
                        kind,
                        Direction::SendOnly,
                        Some(section.stream_id.clone()),
                        Some(section.track_id.clone()),
                        None,
                    ));
                }
                Some(mid) if section.offered != section.wanted => {
                    let direction = if section.wanted { Direction::SendOnly } else { Direction::Inactive };
                    api.set_direction(mid, direction);
                }
                Some(_) => continue,
            }
            section.offered = section.wanted;
        }
        let (offer, pending) = api.apply()?;
        self.pending = Some(pending);
        let mids = self
            .sections
            .iter()
            .filter(|(_, section)| section.wanted)
            .filter_map(|(track, section)| Some((section.mid?.to_string(), *track)))
            .collect();
        Some(Event::Offer { peer: self.id, sdp: offer.to_sdp_string(), mids })
    }

    /// Makes the next offer begin a new ICE session, and withdraws the one that is unanswered.
    pub(crate) fn restart_ice(&mut self) -> Result<(), PeerError> {
        if self.role != PeerRole::Subscriber {
            return Err(PeerError::WrongRole);
        }
        // Before the first answer there is no session to begin anew: its offer is made again.
        self.restart = self.negotiated;
        if self.pending.take().is_some() {
            self.opened = self.negotiated;
            for section in self.sections.values_mut().filter(|section| !section.negotiated) {
                section.mid = None;
                section.offered = false;
            }
            self.sections.retain(|_, section| section.wanted || section.mid.is_some());
        }
        Ok(())
    }

    /// Takes the client's answer to our last offer.
    pub(crate) fn accept(&mut self, answer: &str) -> Result<(), PeerError> {
        if self.role != PeerRole::Subscriber {
            return Err(PeerError::WrongRole);
        }
        if self.pending.is_none() {
            return Err(PeerError::NoOffer);
        }
        sdp::sections(answer)?;
        let answer = SdpAnswer::from_sdp_string(&sdp::subscriber_answer(answer))?;
        let pending = self.pending.take().ok_or(PeerError::NoOffer)?;
        self.broken = true;
        self.rtc.sdp_api().accept_answer(pending, answer)?;
        self.broken = false;
        self.negotiated = true;
        for section in self.sections.values_mut() {
            section.negotiated |= section.mid.is_some();
            section.route = section.mid.filter(|_| section.wanted).and_then(|mid| {
                let route = route(&mut self.rtc, mid, section.kind)?;
                if !section.cached && section.kind == MediaKind::Video {
                    let mut api = self.rtc.direct_api();
                    let stream = api.stream_tx(&route.0)?;
                    stream.set_rtx_cache(VIDEO_CACHE, CACHE_AGE, RTX_SHARE);
                    section.cached = true;
                }
                Some(route)
            });
        }
        Ok(())
    }

    /// The track that a section carries.
    pub(crate) fn track_of(&self, mid: Mid) -> Option<TrackKey> {
        self.sections.iter().find(|(_, section)| section.mid == Some(mid)).map(|(track, _)| *track)
    }

    /// The layer of a track that is being forwarded.
    pub(crate) fn layer_of(&self, track: TrackKey) -> Option<u8> {
        self.sections.get(&track)?.downtrack.layer()
    }

    /// The layer whose key frame this subscriber needs, if it has not been asked for lately.
    pub(crate) fn wants_key_frame(&mut self, now: Instant, track: TrackKey) -> Option<u8> {
        let section = self.sections.get_mut(&track)?;
        if !self.connected || section.route.is_none() {
            return None;
        }
        section.downtrack.wants_key_frame(now)
    }

    /// Forwards a packet if this subscriber should have it; returns whether the peer must be driven.
    pub(crate) fn forward(
        &mut self,
        now: Instant,
        track: TrackKey,
        incoming: &Incoming<'_>,
        packet: &RtpPacket,
    ) -> bool {
        let Some(section) = self.sections.get_mut(&track) else { return false };
        let Some((ssrc, pt)) = section.route.filter(|_| self.connected) else { return false };
        let Some(out) = section.downtrack.forward(now, incoming) else { return false };
        let mut api = self.rtc.direct_api();
        let Some(stream) = api.stream_tx(&ssrc) else { return false };
        let extensions = ExtensionValues {
            video_orientation: packet.header.ext_vals.video_orientation,
            ..Default::default()
        };
        let payload = rewritten(&packet.payload, &out);
        stream.write_rtp(
            RtpWrite::new(pt, out.sequence.into(), out.timestamp, now, payload)
                .marker(packet.header.marker)
                .nackable(section.kind == MediaKind::Video)
                .ext_vals(extensions),
        );
        true
    }
}

/// The payload to send: shared if untouched, a copy with a renumbered descriptor otherwise.
fn rewritten(payload: &Arc<[u8]>, out: &Outgoing) -> Arc<[u8]> {
    match &out.vp8 {
        Some((descriptor, numbers)) if *numbers != descriptor.numbers => {
            let mut copy: Arc<[u8]> = Arc::from(&payload[..]);
            if let Some(bytes) = Arc::get_mut(&mut copy) {
                descriptor.renumber(bytes, numbers);
            }
            copy
        }
        _ => Arc::clone(payload),
    }
}

/// SSRC and payload type of a section that the client agreed to receive.
fn route(rtc: &mut Rtc, mid: Mid, kind: MediaKind) -> Option<(Ssrc, Pt)> {
    let media = rtc.media(mid)?;
    if media.disabled() || !media.direction().is_sending() {
        return None;
    }
    let codec = match kind {
        MediaKind::Audio => Codec::Opus,
        MediaKind::Video => Codec::Vp8,
    };
    let accepted = media.remote_pts();
    let pt = rtc
        .codec_config()
        .params()
        .iter()
        .find(|p| p.spec().codec == codec && accepted.contains(&p.pt()))?
        .pt();
    let ssrc = rtc.direct_api().stream_tx_by_mid(mid, None)?.ssrc();
    Some((ssrc, pt))
}
