//! One peer connection over the `webrtc` crates, with the work-arounds that they need.
//!
//! Nothing outside this folder sees a type of the engine. Its callbacks run on the task that also serves ICE consent,
//! so they only put things into a channel and never wait.

use std::{
    collections::VecDeque,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rtc::{
    ice::mdns::MulticastDnsMode,
    interceptor::{CongestionControlBuilder, Registry, Slot, TwccReceiverBuilder, TwccSenderBuilder},
    peer_connection::configuration::interceptor_registry::{
        configure_nack, configure_rtcp_reports, configure_simulcast_extension_headers,
    },
    rtp_transceiver::rtp_sender::{
        RTCRtpCodingParameters, RTCRtpEncodingParameters, RTCRtpHeaderExtensionCapability,
        RTCRtpRtxParameters, RtpCodecKind,
    },
};
use tokio::sync::mpsc;
use webrtc::{
    data_channel::{DataChannel, RTCDataChannelInit},
    media_stream::{
        MediaStreamTrack,
        track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP},
    },
    peer_connection::{
        MediaEngine, PeerConnection, PeerConnectionBuilder, RTCConfiguration, RTCConfigurationBuilder,
        RTCIceCandidateInit, RTCIceServer, RTCIceTransportPolicy, RTCSessionDescription,
        SettingEngineBuilder,
    },
    rtp_transceiver::{RTCRtpTransceiverDirection, RTCRtpTransceiverInit},
};

pub(in crate::transport) use self::codecs::codec_of_mime;
use self::{
    codecs::{ALL_CODECS, kind, parameters},
    feedback::Feedback,
    handler::Handler,
    sockets::Sockets,
    uplink::Uplink,
};
pub(in crate::transport) use self::{
    data::{Channel, ChannelEvent},
    incoming::{Arrival, IncomingTrack},
    outgoing::{OutgoingTrack, Report},
};
use super::{
    ice::{IceServer, Network, Reachable},
    sections::{candidates, digestible_answer, digestible_mutual_offer, digestible_offer, honest_answer},
};
use crate::{media::Codec, transport::TransportError};

mod codecs;
mod data;
mod dependency;
mod feedback;
mod handler;
mod incoming;
mod outgoing;
mod repeats;
mod sockets;
mod uplink;

#[cfg(test)]
mod tests;

/// Engine events that may wait. Callbacks cannot wait, so an overflow is a failure of the connection.
pub(in crate::transport) const EVENTS: usize = 512;
/// Remote candidates that may wait for their description.
const MOST_EARLY_CANDIDATES: usize = 64;
/// Candidates of either side that are kept for a report.
const MOST_NOTED_CANDIDATES: usize = 16;
/// How long closing a peer connection may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes that may wait in a data channel until its writer has to wait.
const DATA_BUFFER: usize = 1 << 20;
/// How long ICE waits between two rounds of checks. The engine's default of 200 ms delays every connection by as much:
/// only the second round nominates a pair.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Checks of a pair until it is given up: after 2 s towards an SFU. A member's network may be away and come back, and
/// its signalling decides when to give up, so there are enough for 20 s.
const MOST_CHECKS: u16 = 40;
const MOST_MESH_CHECKS: u16 = 400;
/// How long ICE looks for a path to an SFU after it was interrupted; and to a member, whose signalling is slower and
/// decides itself when to give up.
const PATIENCE: Duration = Duration::from_secs(10);
const MESH_PATIENCE: Duration = Duration::from_secs(30);
/// How loud a packet of audio is (RFC 6464).
const AUDIO_LEVEL: &str = "urn:ietf:params:rtp-hdrext:ssrc-audio-level";
/// Header extension with the numbers that the feedback about the uplink names.
const TRANSPORT_CC: &str = "http://www.ietf.org/id/draft-holmer-rmcat-transport-wide-cc-extensions-01";
/// The names of simulcast layers, lowest first, as LiveKit expects them.
const RIDS: [&str; 3] = ["q", "h", "f"];

/// What a peer connection reports.
pub(in crate::transport) enum PeerEvent {
    /// A local candidate, as the JSON of an `RTCIceCandidateInit`.
    Candidate(String),
    /// ICE found a path.
    IceConnected,
    /// Media flows.
    Up,
    /// No candidate of ours follows, until ICE is restarted.
    Gathered,
    /// The path is lost; ICE may find it again.
    Interrupted,
    /// The connection is lost for good, unless ICE is restarted.
    Failed,
    /// A remote track starts.
    Track(IncomingTrack),
    /// The other side opened a data channel.
    Channel(Channel),
}

/// One peer connection.
pub(in crate::transport) struct Peer {
    connection: Arc<dyn PeerConnection>,
    servers: tokio::sync::Mutex<Reachable>,
    /// Whether the other side's description is set.
    described: bool,
    early: VecDeque<RTCIceCandidateInit>,
    shared: Arc<Shared>,
    /// The other side's candidates.
    remote_candidates: Vec<Noted>,
}

/// What the engine's callbacks share with the connection.
#[derive(Default)]
struct Shared {
    overflowed: AtomicBool,
    /// Estimate of the uplink in bits per second; 0 before the first feedback.
    uplink: Arc<AtomicU64>,
    local_candidates: Mutex<Vec<Noted>>,
}

/// An offer that is not applied yet.
pub(in crate::transport) struct Offer(RTCSessionDescription);

impl Offer {
    pub(in crate::transport) fn sdp(&self) -> &str {
        &self.0.sdp
    }
}

impl Peer {
    /// Opens a connection; its events come with `tag`.
    pub(in crate::transport) async fn open<T: Copy + Send + Sync + 'static>(
        network: &Network,
        ice_servers: Vec<IceServer>,
        tag: T,
        events: mpsc::Sender<(T, PeerEvent)>,
    ) -> Result<Self, TransportError> {
        let shared = Arc::<Shared>::default();
        let mut servers = Reachable::default();
        let addresses = &network.addresses;
        let mut media_engine = MediaEngine::default();
        // Only codecs that we can cut and put together: the SFU then never sends another.
        for codec in ALL_CODECS {
            for parameters in parameters(codec) {
                media_engine.register_codec(parameters, kind(codec)).map_err(media)?;
            }
        }
        let registry = interceptors(&mut media_engine, &shared)?;
        let settings = SettingEngineBuilder::new()
            .with_multicast_dns_mode(multicast_dns(network))
            .with_ice_timeouts(
                Some(Duration::from_secs(5)),
                Some(if network.mesh { MESH_PATIENCE } else { PATIENCE }),
                Some(Duration::from_secs(2)),
            )
            .with_ice_connection_attempts(
                Some(CHECK_INTERVAL),
                Some(if network.mesh { MOST_MESH_CHECKS } else { MOST_CHECKS }),
            )
            .build();
        // Where UDP is blocked, SFUs are reached by TCP (RFC 6544). Members can't be.
        let tcp = addresses.iter().filter(|_| !network.mesh);
        let tcp = tcp.map(|address| SocketAddr::new(address.ip(), 0)).collect();
        let connection = PeerConnectionBuilder::new()
            .with_configuration(configuration(network, servers.update(network, ice_servers).await))
            .with_media_engine(media_engine)
            .with_interceptor_registry(registry)
            .with_setting_engine(settings)
            .with_runtime(Arc::new(Sockets::default()))
            .with_handler(Arc::new(Handler { tag, events, shared: Arc::clone(&shared) }))
            .with_udp_addrs(addresses.clone())
            .with_tcp_addrs(tcp)
            .with_data_channel_send_buffer_limit(DATA_BUFFER)
            .build()
            .await
            .map_err(media)?;
        Ok(Self {
            connection: Arc::new(connection),
            servers: tokio::sync::Mutex::new(servers),
            described: false,
            early: VecDeque::new(),
            shared,
            remote_candidates: Vec::new(),
        })
    }

    /// Replaces the ICE servers; they are used from the next gathering of candidates on.
    pub(in crate::transport) async fn set_ice_servers(
        &self,
        network: &Network,
        ice_servers: Vec<IceServer>,
    ) -> Result<(), TransportError> {
        let usable = self.servers.lock().await.update(network, ice_servers).await;
        self.connection.set_configuration(configuration(network, usable)).await.map_err(media)
    }

    /// Opens a data channel; without `reliable`, messages are sent once, in any order.
    pub(in crate::transport) async fn open_channel(
        &self,
        label: &str,
        reliable: bool,
    ) -> Result<Channel, TransportError> {
        let init = RTCDataChannelInit {
            ordered: reliable,
            max_retransmits: (!reliable).then_some(0),
            ..Default::default()
        };
        let channel: Arc<dyn DataChannel> =
            self.connection.create_data_channel(label, Some(init)).await.map_err(media)?;
        Ok(Channel::new(channel))
    }

    /// Adds a section in which the other side may send a track.
    pub(in crate::transport) async fn add_receiving_section(
        &self,
        audio: bool,
    ) -> Result<(), TransportError> {
        let kind = if audio { RtpCodecKind::Audio } else { RtpCodecKind::Video };
        let init = RTCRtpTransceiverInit {
            direction: RTCRtpTransceiverDirection::Recvonly,
            streams: Vec::new(),
            send_encodings: Vec::new(),
        };
        self.connection.add_transceiver_from_kind(kind, Some(init)).await.map_err(media)?;
        Ok(())
    }

    /// Adds a track with so many simulcast layers (one: none); it is on the wire after the next offer.
    ///
    /// The track half of the msid is `cid`. `dimensions` are those of the largest layer, in pixels.
    pub(in crate::transport) async fn add_track(
        &self,
        codec: Codec,
        cid: &str,
        layers: usize,
        dimensions: (u32, u32),
    ) -> Result<OutgoingTrack, TransportError> {
        self.add_sender(codec, &format!("stream-{cid}"), cid, layers, dimensions, false).await
    }

    /// Adds a section to send one track after the other in, all in the same codec: [`OutgoingTrack::assign`].
    ///
    /// `mutual`: for a section that the other side is about to offer, in which it may send too. The engine takes the
    /// first that fits, in the order in which they were added.
    pub(in crate::transport) async fn add_sending_section(
        &self,
        codec: Codec,
        stream: &str,
        dimensions: (u32, u32),
        mutual: bool,
    ) -> Result<OutgoingTrack, TransportError> {
        let id = format!("{:032x}", rand::random::<u128>());
        self.add_sender(codec, stream, &id, 1, dimensions, mutual).await
    }

    async fn add_sender(
        &self,
        codec: Codec,
        stream: &str,
        cid: &str,
        layers: usize,
        dimensions: (u32, u32),
        mutual: bool,
    ) -> Result<OutgoingTrack, TransportError> {
        let simulcast = layers > 1;
        let mut preferences = parameters(codec);
        // One form of the codec is published, with its retransmission stream.
        preferences.truncate(if codec.is_audio() { 1 } else { 2 });
        let primary = preferences.first().cloned().ok_or(TransportError::UnsupportedCodec(codec))?;
        let encodings: Vec<_> = (0..layers.clamp(1, RIDS.len()))
            .map(|layer| RTCRtpEncodingParameters {
                rtp_coding_parameters: RTCRtpCodingParameters {
                    rid: if simulcast { RIDS[layer].into() } else { Default::default() },
                    ssrc: Some(rand::random::<u32>()),
                    // The engine names no layer in retransmissions, so that receivers of simulcast could not assign
                    // them. Without a retransmission stream it sends lost packets again as they were.
                    rtx: (!simulcast && !codec.is_audio())
                        .then(|| RTCRtpRtxParameters { ssrc: rand::random() }),
                    ..Default::default()
                },
                active: true,
                codec: primary.rtp_codec.clone(),
                ..Default::default()
            })
            .collect();
        let ssrcs = encodings.iter().filter_map(|encoding| encoding.rtp_coding_parameters.ssrc).collect();
        let direction =
            if mutual { RTCRtpTransceiverDirection::Sendrecv } else { RTCRtpTransceiverDirection::Sendonly };
        let track = Arc::new(TrackLocalStaticRTP::new(MediaStreamTrack::new(
            stream.to_owned(),
            cid.to_owned(),
            cid.to_owned(),
            kind(codec),
            encodings.clone(),
        )));
        // A transceiver of its own instead of `add_track`, which would reuse the section of an ended track: the SFU
        // matches only sections that it has not seen before.
        let transceiver = self
            .connection
            .add_transceiver_from_track(
                Arc::clone(&track) as Arc<dyn TrackLocal>,
                Some(RTCRtpTransceiverInit {
                    direction,
                    streams: vec![stream.to_owned()],
                    send_encodings: encodings,
                }),
            )
            .await
            .map_err(media)?;
        // The engine offers only the codec of the encoding; without this line there would be no RTX.
        transceiver.set_codec_preferences(preferences).await.map_err(media)?;
        OutgoingTrack::new(track, transceiver, ssrcs, codec, dimensions).await
    }

    /// Takes a track out; the other side learns it from the next offer.
    pub(in crate::transport) async fn remove_track(
        &self,
        track: &OutgoingTrack,
    ) -> Result<(), TransportError> {
        self.connection.remove_track(track.sender()).await.map_err(media)
    }

    /// Makes the next offer renew the ICE credentials.
    pub(in crate::transport) async fn restart_ice(&self) -> Result<(), TransportError> {
        self.connection.restart_ice().await.map_err(media)
    }

    /// Makes an offer without applying it.
    pub(in crate::transport) async fn create_offer(&self) -> Result<Offer, TransportError> {
        self.connection.create_offer(None).await.map(Offer).map_err(media)
    }

    /// Applies an offer of ours; candidates are gathered from now on.
    pub(in crate::transport) async fn apply_offer(&self, offer: Offer) -> Result<(), TransportError> {
        self.connection.set_local_description(offer.0).await.map_err(media)
    }

    /// Makes the next offer and applies it.
    pub(in crate::transport) async fn offer(&self) -> Result<String, TransportError> {
        let offer = self.create_offer().await?;
        let sdp = offer.sdp().to_owned();
        self.apply_offer(offer).await?;
        Ok(sdp)
    }

    /// Takes the other side's answer to our offer.
    pub(in crate::transport) async fn take_answer(&mut self, sdp: &str) -> Result<(), TransportError> {
        let answer = RTCSessionDescription::answer(digestible_answer(sdp)).map_err(media)?;
        self.describe(answer, sdp).await
    }

    /// Takes the offer of an SFU; returns the answer to send.
    pub(in crate::transport) async fn answer_offer(&mut self, offer: &str) -> Result<String, TransportError> {
        self.take_offer(offer, digestible_offer(offer)).await?;
        self.answer(offer).await
    }

    /// Takes the offer of a member. `known` says of a section's id whether an earlier offer had it.
    pub(in crate::transport) async fn take_mutual_offer(
        &mut self,
        offer: &str,
        known: impl Fn(&str) -> bool,
    ) -> Result<(), TransportError> {
        self.take_offer(offer, digestible_mutual_offer(offer, known)).await
    }

    async fn take_offer(&mut self, offer: &str, digestible: String) -> Result<(), TransportError> {
        let description = RTCSessionDescription::offer(digestible).map_err(media)?;
        self.describe(description, offer).await
    }

    /// Makes the answer to an offer that was taken, and applies it.
    pub(in crate::transport) async fn answer(&self, offer: &str) -> Result<String, TransportError> {
        let answer = self.connection.create_answer(None).await.map_err(media)?;
        let sdp = honest_answer(&answer.sdp, offer);
        self.connection.set_local_description(answer).await.map_err(media)?;
        Ok(sdp)
    }

    async fn describe(
        &mut self,
        description: RTCSessionDescription,
        sdp: &str,
    ) -> Result<(), TransportError> {
        for candidate in candidates(sdp) {
            note(&mut self.remote_candidates, candidate);
        }
        self.connection.set_remote_description(description).await.map_err(media)?;
        self.described = true;
        for candidate in std::mem::take(&mut self.early) {
            self.use_candidate(candidate).await;
        }
        Ok(())
    }

    /// Takes a candidate of the other side as the JSON of an `RTCIceCandidateInit`.
    pub(in crate::transport) async fn add_candidate(&mut self, json: &str) {
        match serde_json::from_str::<RTCIceCandidateInit>(json) {
            Ok(candidate) if candidate.candidate.is_empty() => {}
            Ok(candidate) => {
                note(&mut self.remote_candidates, &candidate.candidate);
                self.use_candidate(candidate).await;
            }
            Err(error) => tracing::warn!(%error, "the other side sent an invalid ICE candidate"),
        }
    }

    async fn use_candidate(&mut self, candidate: RTCIceCandidateInit) {
        if !self.described {
            if self.early.len() < MOST_EARLY_CANDIDATES {
                self.early.push_back(candidate);
            }
            return;
        }
        if let Err(error) = self.connection.add_ice_candidate(candidate).await {
            tracing::debug!(%error, "the engine cannot use a candidate of the other side");
        }
    }

    /// The candidate pairs `local -> remote` that ICE could try, at most `most`.
    pub(in crate::transport) fn pairs(&self, most: usize) -> Vec<String> {
        let local = self.shared.local_candidates.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = local.iter().flat_map(|local| {
            let remote = self.remote_candidates.iter().filter(|remote| local.pairs_with(remote));
            remote.map(move |remote| format!("{local} -> {remote}"))
        });
        pairs.take(most).collect()
    }

    /// Whether an event was lost because nobody took it in time: the connection's state is unknown then.
    pub(in crate::transport) fn overflowed(&self) -> bool {
        self.shared.overflowed.load(Ordering::Relaxed)
    }

    /// How much the other side's feedback allows to send, in bits per second; `None` before the first feedback.
    pub(in crate::transport) fn uplink(&self) -> Option<u64> {
        Some(self.shared.uplink.load(Ordering::Relaxed)).filter(|bits| *bits > 0)
    }

    /// Closes it.
    pub(in crate::transport) async fn close(&self) {
        match tokio::time::timeout(CLOSE_TIMEOUT, self.connection.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a peer connection closed with an error"),
            Err(_) => tracing::warn!("a peer connection did not close in time"),
        }
    }
}

fn configuration(network: &Network, servers: Vec<IceServer>) -> RTCConfiguration {
    let servers = servers.into_iter().map(|server| RTCIceServer {
        urls: server.urls,
        username: server.username,
        credential: server.credential,
    });
    let policy = if network.relay_only { RTCIceTransportPolicy::Relay } else { RTCIceTransportPolicy::All };
    RTCConfigurationBuilder::new()
        .with_ice_servers(servers.collect())
        .with_ice_transport_policy(policy)
        .build()
}

/// Members in browsers hide their addresses behind names; we don't hide ours so. Without an interface for multicast, as
/// in a network namespace with nothing but loopback, the engine would not open.
fn multicast_dns(network: &Network) -> MulticastDnsMode {
    let usable = || rtc::mdns::MulticastSocket::new().into_std().is_ok();
    if network.mesh && !network.is_local() && !network.relay_only && usable() {
        MulticastDnsMode::QueryOnly
    } else {
        MulticastDnsMode::Disabled
    }
}

/// The interceptors for RTP and RTCP. A pacer is missing on purpose: it would hold back what exceeds the
/// estimate, without bound.
fn interceptors(engine: &mut MediaEngine, shared: &Shared) -> Result<Registry, TransportError> {
    let registry = configure_nack(Registry::new(), engine);
    configure_simulcast_extension_headers(engine).map_err(media)?;
    let registry = configure_rtcp_reports(registry);
    engine
        .register_header_extension(
            RTCRtpHeaderExtensionCapability { uri: dependency::URI.to_owned() },
            RtpCodecKind::Video,
            None,
        )
        .map_err(media)?;
    engine
        .register_header_extension(
            RTCRtpHeaderExtensionCapability { uri: AUDIO_LEVEL.to_owned() },
            RtpCodecKind::Audio,
            None,
        )
        .map_err(media)?;
    // For video only: an SFU that does not take the numbers of audio packets would report those as lost.
    engine
        .register_header_extension(
            RTCRtpHeaderExtensionCapability { uri: TRANSPORT_CC.to_owned() },
            RtpCodecKind::Video,
            None,
        )
        .map_err(media)?;
    Ok(registry
        .with(
            Slot::CongestionControl,
            CongestionControlBuilder::new(Uplink::new(Arc::clone(&shared.uplink))).build(),
        )
        .with(Slot::TwccSender, TwccSenderBuilder::new().build())
        .with(Slot::TwccReceiver, TwccReceiverBuilder::new().build())
        // Last in the chain, so that every other interceptor has seen the RTCP before.
        .with(Slot::from(14_000), Feedback::default()))
}

/// What a report says about an ICE candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Noted {
    address: SocketAddr,
    tcp: bool,
    /// `host`, `srflx`, `prflx` or `relay`.
    kind: String,
}

impl Noted {
    /// Reads an ICE candidate (RFC 8839 §5.1); `None` if it is malformed or has a name in place of an address.
    fn of(candidate: &str) -> Option<Self> {
        let mut fields = candidate.split_ascii_whitespace();
        let tcp = fields.nth(2)?.eq_ignore_ascii_case("tcp");
        let (address, port) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        let kind = fields.nth(1)?.chars().take(8).collect();
        Some(Self { address: SocketAddr::new(address, port), tcp, kind })
    }

    fn pairs_with(&self, other: &Self) -> bool {
        self.tcp == other.tcp && self.address.is_ipv4() == other.address.is_ipv4()
    }
}

impl fmt::Display for Noted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} {}", self.address, if self.tcp { "tcp" } else { "udp" }, self.kind)
    }
}

/// Adds a candidate to those that are kept for a report.
fn note(noted: &mut Vec<Noted>, candidate: &str) {
    if let Some(candidate) = Noted::of(candidate)
        && noted.len() < MOST_NOTED_CANDIDATES
        && !noted.contains(&candidate)
    {
        noted.push(candidate);
    }
}

fn media(error: impl std::error::Error + Send + Sync + 'static) -> TransportError {
    TransportError::Media(Box::new(error))
}
