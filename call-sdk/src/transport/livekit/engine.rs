//! The two peer connections of a LiveKit session, and the work-arounds that the engine needs.
//!
//! Nothing outside this folder sees a type of the engine. Its callbacks run on the task that also serves ICE
//! consent, so they only put things into a channel and never wait.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use livekit_protocol as proto;
use rtc::{
    ice::mdns::MulticastDnsMode,
    interceptor::{
        Attribute, AttributedPacket, Interceptor, Packet, Registry, Slot, StreamInfo, TaggedPacket,
    },
    rtcp::payload_feedbacks::{
        full_intra_request::FullIntraRequest, picture_loss_indication::PictureLossIndication,
    },
    rtp_transceiver::rtp_sender::{
        RTCPFeedback, RTCRtpCodec, RTCRtpCodecParameters, RTCRtpCodingParameters, RTCRtpEncodingParameters,
        RTCRtpRtxParameters, RtpCodecKind,
    },
    sansio::Protocol,
    shared::error::Error as RtcError,
};
use tokio::sync::mpsc;
use webrtc::{
    media_stream::{
        MediaStreamTrack,
        track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP},
        track_remote::TrackRemote,
    },
    peer_connection::{
        MediaEngine, PeerConnection, PeerConnectionBuilder, PeerConnectionEventHandler,
        RTCConfigurationBuilder, RTCIceCandidateInit, RTCIceServer, RTCPeerConnectionIceEvent,
        RTCPeerConnectionState, RTCSessionDescription, SettingEngineBuilder, register_default_interceptors,
    },
    rtp_transceiver::{RTCRtpTransceiverDirection, RTCRtpTransceiverInit, RtpSender},
};

use super::{
    connect::IceServer,
    sections::{digestible_offer, honest_answer},
};
use crate::{media::Codec, transport::TransportError};

/// How many engine events may wait. Callbacks cannot wait, so an overflow is a failure of the connection.
const EVENTS: usize = 512;
/// Remote candidates that may wait for their description.
const MOST_EARLY_CANDIDATES: usize = 64;
/// How long closing a peer connection may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Which of the two peer connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Carries our tracks; we offer.
    Publisher,
    /// Carries everybody else's; the SFU offers.
    Subscriber,
}

impl Side {
    pub(super) fn target(self) -> proto::SignalTarget {
        match self {
            Self::Publisher => proto::SignalTarget::Publisher,
            Self::Subscriber => proto::SignalTarget::Subscriber,
        }
    }
}

/// What the peer connections report.
pub(super) enum EngineEvent {
    /// A local candidate, as the JSON that travels in TrickleRequest.
    Candidate(Side, String),
    /// Media flows on this side.
    Up(Side),
    /// This side is lost for good.
    Failed(Side),
    /// A remote track starts.
    Track(Arc<dyn TrackRemote>),
}

/// A local track inside the publisher.
#[derive(Clone)]
pub(super) struct SendingTrack {
    pub(super) track: Arc<TrackLocalStaticRTP>,
    pub(super) ssrc: u32,
    sender: Arc<dyn RtpSender>,
    mime: &'static str,
}

impl SendingTrack {
    /// The payload type that the negotiation gave this track.
    pub(super) async fn payload_type(&self) -> Result<u8, TransportError> {
        let parameters = self.sender.get_parameters().await.map_err(media)?;
        parameters
            .rtp_parameters
            .codecs
            .iter()
            .find(|codec| codec.rtp_codec.mime_type.eq_ignore_ascii_case(self.mime))
            .map(|codec| codec.payload_type)
            .ok_or_else(|| TransportError::TrackRefused(format!("{} was not negotiated", self.mime)))
    }
}

/// Both peer connections.
pub(super) struct Engine {
    publisher: Half,
    subscriber: Half,
    overflowed: Arc<AtomicBool>,
}

struct Half {
    connection: Arc<dyn PeerConnection>,
    described: bool,
    early: VecDeque<RTCIceCandidateInit>,
}

impl Engine {
    /// Opens both on the given local addresses.
    pub(super) async fn open(
        addresses: &[SocketAddr],
        ice_servers: Vec<IceServer>,
    ) -> Result<(Self, mpsc::Receiver<EngineEvent>), TransportError> {
        let (events, receiver) = mpsc::channel(EVENTS);
        // A loopback-only connection needs no server to learn its address, and must not ask one.
        let local_only = addresses.iter().all(|address| address.ip().is_loopback());
        let servers: Vec<_> = ice_servers
            .into_iter()
            .filter(|_| !local_only)
            .filter_map(IceServer::usable)
            .map(|server| RTCIceServer {
                urls: server.urls,
                username: server.username,
                credential: server.credential,
            })
            .collect();
        let overflowed = Arc::new(AtomicBool::new(false));
        let handler = |side| Handler { side, events: events.clone(), overflowed: Arc::clone(&overflowed) };
        let publisher = Half::open(handler(Side::Publisher), addresses, servers.clone()).await?;
        let subscriber = Half::open(handler(Side::Subscriber), addresses, servers).await?;
        Ok((Self { publisher, subscriber, overflowed }, receiver))
    }

    /// Adds a track to the publisher; it is on the wire after the next offer.
    ///
    /// The track half of the msid is `cid`, by which the SFU finds the AddTrackRequest.
    pub(super) async fn add_track(&self, codec: Codec, cid: &str) -> Result<SendingTrack, TransportError> {
        let parameters = codec_parameters(codec)?;
        let kind = kind(codec);
        let primary = parameters.first().ok_or(TransportError::UnsupportedCodec(codec))?;
        let ssrc = rand::random::<u32>();
        let encoding = RTCRtpEncodingParameters {
            rtp_coding_parameters: RTCRtpCodingParameters {
                ssrc: Some(ssrc),
                rtx: (!codec.is_audio()).then(|| RTCRtpRtxParameters { ssrc: rand::random() }),
                ..Default::default()
            },
            active: true,
            codec: primary.rtp_codec.clone(),
            ..Default::default()
        };
        let stream = format!("stream-{cid}");
        let media_track = MediaStreamTrack::new(
            stream.clone(),
            cid.to_owned(),
            cid.to_owned(),
            kind,
            vec![encoding.clone()],
        );
        let track = Arc::new(TrackLocalStaticRTP::new(media_track));
        // A transceiver of its own instead of `add_track`, which would reuse the section of an ended track:
        // the SFU matches only sections that it has not seen before.
        let transceiver = self
            .publisher
            .connection
            .add_transceiver_from_track(
                Arc::clone(&track) as Arc<dyn TrackLocal>,
                Some(RTCRtpTransceiverInit {
                    direction: RTCRtpTransceiverDirection::Sendonly,
                    streams: vec![stream],
                    send_encodings: vec![encoding],
                }),
            )
            .await
            .map_err(media)?;
        // The engine offers only the codec of the encoding; without this line there would be no RTX.
        transceiver.set_codec_preferences(parameters).await.map_err(media)?;
        let sender = transceiver
            .sender()
            .await
            .map_err(media)?
            .ok_or_else(|| TransportError::TrackRefused("the engine made no sender".to_owned()))?;
        Ok(SendingTrack { track, ssrc, sender, mime: mime(codec) })
    }

    /// Takes a track out of the publisher; the SFU learns it from the next offer.
    pub(super) async fn remove_track(&self, sending: &SendingTrack) -> Result<(), TransportError> {
        self.publisher.connection.remove_track(&sending.sender).await.map_err(media)
    }

    /// Makes the publisher's next offer.
    pub(super) async fn offer(&self) -> Result<String, TransportError> {
        let connection = &self.publisher.connection;
        let offer = connection.create_offer(None).await.map_err(media)?;
        let sdp = offer.sdp.clone();
        connection.set_local_description(offer).await.map_err(media)?;
        Ok(sdp)
    }

    /// Takes the SFU's answer for the publisher.
    pub(super) async fn take_answer(&mut self, sdp: String) -> Result<(), TransportError> {
        let answer = RTCSessionDescription::answer(sdp).map_err(media)?;
        self.publisher.describe(answer).await
    }

    /// Takes the SFU's offer for the subscriber; returns the answer to send.
    pub(super) async fn answer_offer(&mut self, offer: &str) -> Result<String, TransportError> {
        let digestible = digestible_offer(offer);
        let description = RTCSessionDescription::offer(digestible).map_err(media)?;
        self.subscriber.describe(description).await?;
        let connection = &self.subscriber.connection;
        let answer = connection.create_answer(None).await.map_err(media)?;
        let sdp = honest_answer(&answer.sdp, offer);
        connection.set_local_description(answer).await.map_err(media)?;
        Ok(sdp)
    }

    /// Takes a candidate of the SFU as the JSON of TrickleRequest.
    pub(super) async fn add_candidate(&mut self, side: Side, json: &str) {
        match serde_json::from_str::<RTCIceCandidateInit>(json) {
            Ok(candidate) if candidate.candidate.is_empty() => {}
            Ok(candidate) => self.half(side).add_candidate(candidate).await,
            Err(error) => tracing::warn!(%error, "the SFU sent a candidate that is not one"),
        }
    }

    /// Whether an event was lost because nobody took it in time: the connection's state is unknown then.
    pub(super) fn overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Closes both.
    pub(super) async fn close(self) {
        for half in [self.publisher, self.subscriber] {
            match tokio::time::timeout(CLOSE_TIMEOUT, half.connection.close()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a peer connection closed with an error"),
                Err(_) => tracing::warn!("a peer connection did not close in time"),
            }
        }
    }

    fn half(&mut self, side: Side) -> &mut Half {
        match side {
            Side::Publisher => &mut self.publisher,
            Side::Subscriber => &mut self.subscriber,
        }
    }
}

impl Half {
    async fn open(
        handler: Handler,
        addresses: &[SocketAddr],
        servers: Vec<RTCIceServer>,
    ) -> Result<Self, TransportError> {
        let mut engine = MediaEngine::default();
        // Only codecs that this transport can cut and put together: the SFU then never sends another.
        for codec in [Codec::Opus, Codec::Vp8] {
            for parameters in codec_parameters(codec)? {
                engine.register_codec(parameters, kind(codec)).map_err(media)?;
            }
        }
        let registry = register_default_interceptors(Registry::new(), &mut engine)
            .map_err(media)?
            // Last in the chain, so that every other interceptor has seen the RTCP before.
            .with(Slot::from(14_000), KeyFrameRequests::default());
        let settings = SettingEngineBuilder::new()
            .with_multicast_dns_mode(MulticastDnsMode::Disabled)
            .with_ice_timeouts(
                Some(Duration::from_secs(5)),
                Some(Duration::from_secs(10)),
                Some(Duration::from_secs(2)),
            )
            .build();
        let connection = PeerConnectionBuilder::new()
            .with_configuration(RTCConfigurationBuilder::new().with_ice_servers(servers).build())
            .with_media_engine(engine)
            .with_interceptor_registry(registry)
            .with_setting_engine(settings)
            .with_handler(Arc::new(handler))
            .with_udp_addrs(addresses.to_vec())
            .build()
            .await
            .map_err(media)?;
        Ok(Self { connection: Arc::new(connection), described: false, early: VecDeque::new() })
    }

    async fn describe(&mut self, description: RTCSessionDescription) -> Result<(), TransportError> {
        self.connection.set_remote_description(description).await.map_err(media)?;
        self.described = true;
        for candidate in std::mem::take(&mut self.early) {
            self.add_candidate(candidate).await;
        }
        Ok(())
    }

    async fn add_candidate(&mut self, candidate: RTCIceCandidateInit) {
        if !self.described {
            if self.early.len() < MOST_EARLY_CANDIDATES {
                self.early.push_back(candidate);
            }
            return;
        }
        if let Err(error) = self.connection.add_ice_candidate(candidate).await {
            tracing::debug!(%error, "the engine cannot use a candidate of the SFU");
        }
    }
}

struct Handler {
    side: Side,
    events: mpsc::Sender<EngineEvent>,
    overflowed: Arc<AtomicBool>,
}

impl Handler {
    fn report(&self, event: EngineEvent) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            self.overflowed.store(true, Ordering::Relaxed);
        }
    }
}

#[async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_candidate(&self, event: RTCPeerConnectionIceEvent) {
        let Ok(mut candidate) = event.candidate.to_json() else { return };
        candidate.sdp_mid = Some("0".to_owned());
        candidate.sdp_mline_index = Some(0);
        if let Ok(json) = serde_json::to_string(&candidate) {
            self.report(EngineEvent::Candidate(self.side, json));
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        tracing::debug!(side = ?self.side, %state, "peer connection");
        match state {
            RTCPeerConnectionState::Connected => self.report(EngineEvent::Up(self.side)),
            RTCPeerConnectionState::Failed => self.report(EngineEvent::Failed(self.side)),
            _ => {}
        }
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        self.report(EngineEvent::Track(track));
    }
}

/// Lets key frame requests through to the local tracks: RTCP ends inside the engine otherwise.
#[derive(Default)]
struct KeyFrameRequests {
    reads: VecDeque<TaggedPacket>,
    writes: VecDeque<TaggedPacket>,
}

impl Protocol<TaggedPacket, TaggedPacket, ()> for KeyFrameRequests {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = RtcError;
    type Time = std::time::Instant;

    fn handle_read(&mut self, message: TaggedPacket) -> Result<(), RtcError> {
        let Packet::Rtcp(packets) = &message.message.packet else {
            self.reads.push_back(message);
            return Ok(());
        };
        // One by one: the engine routes a compound packet by the first SSRC in it, and the SFU asks for
        // several tracks at once.
        for packet in packets {
            let any = packet.as_any();
            if any.is::<PictureLossIndication>() || any.is::<FullIntraRequest>() {
                self.reads.push_back(TaggedPacket {
                    now: message.now,
                    transport: message.transport,
                    message: AttributedPacket::new(Packet::Rtcp(vec![packet.clone()]))
                        .with(Attribute::DeliverToApplication),
                });
            }
        }
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.reads.pop_front()
    }

    fn handle_write(&mut self, message: TaggedPacket) -> Result<(), RtcError> {
        self.writes.push_back(message);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.writes.pop_front()
    }
}

impl Interceptor for KeyFrameRequests {
    fn bind_local_stream(&mut self, _: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _: &StreamInfo) {}
}

/// The codec and what repairs it, with the payload types that LiveKit uses too.
fn codec_parameters(codec: Codec) -> Result<Vec<RTCRtpCodecParameters>, TransportError> {
    let feedback =
        |typ: &str, parameter: &str| RTCPFeedback { typ: typ.to_owned(), parameter: parameter.to_owned() };
    match codec {
        Codec::Opus => Ok(vec![RTCRtpCodecParameters {
            rtp_codec: RTCRtpCodec {
                mime_type: mime(codec).to_owned(),
                clock_rate: 48_000,
                channels: 2,
                sdp_fmtp_line: "minptime=10;useinbandfec=1".to_owned(),
                rtcp_feedback: Vec::new(),
            },
            payload_type: 111,
        }]),
        Codec::Vp8 => Ok(vec![
            RTCRtpCodecParameters {
                rtp_codec: RTCRtpCodec {
                    mime_type: mime(codec).to_owned(),
                    clock_rate: 90_000,
                    channels: 0,
                    sdp_fmtp_line: String::new(),
                    rtcp_feedback: vec![
                        feedback("ccm", "fir"),
                        feedback("nack", ""),
                        feedback("nack", "pli"),
                    ],
                },
                payload_type: 96,
            },
            RTCRtpCodecParameters {
                rtp_codec: RTCRtpCodec {
                    mime_type: "video/rtx".to_owned(),
                    clock_rate: 90_000,
                    channels: 0,
                    sdp_fmtp_line: "apt=96".to_owned(),
                    rtcp_feedback: Vec::new(),
                },
                payload_type: 97,
            },
        ]),
        other => Err(TransportError::UnsupportedCodec(other)),
    }
}

fn mime(codec: Codec) -> &'static str {
    match codec {
        Codec::Opus => "audio/opus",
        Codec::Vp8 => "video/VP8",
        Codec::Vp9 => "video/VP9",
        Codec::H264 => "video/H264",
        Codec::H265 => "video/H265",
        Codec::Av1 => "video/AV1",
    }
}

fn kind(codec: Codec) -> RtpCodecKind {
    if codec.is_audio() { RtpCodecKind::Audio } else { RtpCodecKind::Video }
}

fn media(error: impl std::error::Error + Send + Sync + 'static) -> TransportError {
    TransportError::Media(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn engine() -> (Engine, mpsc::Receiver<EngineEvent>) {
        Engine::open(&["127.0.0.1:0".parse().unwrap()], Vec::new()).await.unwrap()
    }

    /// An SFU's offer with data and, per entry, a video section of that direction; ended sections have no SSRC.
    fn offer(version: u32, directions: &[&str]) -> String {
        let mids: Vec<_> = (0..=directions.len()).map(|mid| mid.to_string()).collect();
        let mut sdp = format!(
            "v=0\r\no=- 1 {version} IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n\
             a=fingerprint:sha-256 {}\r\na=group:BUNDLE {}\r\n\
             m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:0\r\n\
             a=sendrecv\r\na=sctp-port:5000\r\na=ice-ufrag:abcdefgh\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\n",
            ["AB"; 32].join(":"),
            mids.join(" ")
        );
        for (index, direction) in directions.iter().enumerate() {
            let mid = index + 1;
            sdp.push_str(&format!(
                "m=video 9 UDP/TLS/RTP/SAVPF 96 97 98\r\nc=IN IP4 0.0.0.0\r\na=setup:actpass\r\na=mid:{mid}\r\n\
                 a=ice-ufrag:abcdefgh\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\na=rtcp-mux\r\n\
                 a=rtpmap:96 VP8/90000\r\na=rtcp-fb:96 nack\r\na=rtcp-fb:96 nack pli\r\n\
                 a=rtpmap:97 rtx/90000\r\na=fmtp:97 apt=96\r\na=rtpmap:98 VP9/90000\r\n"
            ));
            if direction.starts_with("send") {
                sdp.push_str(&format!(
                    "a=ssrc-group:FID {mid}1 {mid}2\r\na=ssrc:{mid}1 cname:x\r\na=ssrc:{mid}2 cname:x\r\n\
                     a=msid:PA_a|TR_{mid}{version} TR_{mid}{version}\r\n"
                ));
            }
            sdp.push_str(&format!("a={direction}\r\n"));
        }
        sdp
    }

    fn directions(answer: &str) -> Vec<&str> {
        answer
            .split("\nm=video")
            .skip(1)
            .map(|section| {
                ["sendrecv", "sendonly", "recvonly", "inactive"]
                    .into_iter()
                    .find(|direction| section.contains(&format!("a={direction}\r")))
                    .unwrap_or_else(|| panic!("no direction in {section}"))
            })
            .collect()
    }

    #[tokio::test]
    async fn video_is_offered_with_its_retransmission_stream_and_under_its_cid() {
        let (engine, _events) = engine().await;
        engine.add_track(Codec::Opus, "cid-mic").await.unwrap();
        engine.add_track(Codec::Vp8, "cid-cam").await.unwrap();
        let sdp = engine.offer().await.unwrap();
        let (_, video) = sdp.split_once("m=video").unwrap();
        for line in ["a=fmtp:97 apt=96", "a=ssrc-group:FID ", "a=msid:stream-cid-cam cid-cam", "a=sendonly"] {
            assert!(video.contains(line), "{line} in {video}");
        }
        assert!(!video.contains("VP9"), "{video}");
        assert!(sdp.contains("a=msid:stream-cid-mic cid-mic"));
        engine.close().await;
    }

    #[tokio::test]
    async fn a_section_may_go_quiet_again_and_again() {
        for quiet in ["inactive", "recvonly"] {
            let (mut engine, _events) = engine().await;
            for round in 0..3 {
                let answer = engine.answer_offer(&offer(2 * round, &["sendonly"])).await.unwrap();
                assert_eq!(directions(&answer), ["recvonly"], "round {round}");
                let answer = engine.answer_offer(&offer(2 * round + 1, &[quiet])).await.unwrap();
                assert_eq!(directions(&answer), ["inactive"], "round {round}");
            }
            engine.close().await;
        }
    }

    #[tokio::test]
    async fn a_section_that_begins_quiet_can_still_receive_later() {
        let (mut engine, _events) = engine().await;
        let answer = engine.answer_offer(&offer(1, &["recvonly", "sendrecv"])).await.unwrap();
        assert_eq!(directions(&answer), ["inactive", "recvonly"]);
        let answer = engine.answer_offer(&offer(2, &["sendrecv", "sendrecv"])).await.unwrap();
        assert_eq!(directions(&answer), ["recvonly", "recvonly"]);
        engine.close().await;
    }

    #[tokio::test]
    async fn a_section_that_names_no_stream_does_not_fail_the_others() {
        let (mut engine, _events) = engine().await;
        let nameless = offer(1, &["sendonly", "sendrecv"])
            .replace("a=ssrc-group:FID 21 22\r\na=ssrc:21 cname:x\r\na=ssrc:22 cname:x\r\n", "");
        let answer = engine.answer_offer(&nameless).await.unwrap();
        assert_eq!(directions(&answer).len(), 2);
        assert_eq!(directions(&answer)[0], "recvonly");
        engine.close().await;
    }

    #[tokio::test]
    async fn only_our_codecs_are_answered() {
        let (mut engine, _events) = engine().await;
        let answer = engine.answer_offer(&offer(1, &["sendrecv"])).await.unwrap();
        assert!(answer.contains("VP8") && answer.contains("apt=96") && !answer.contains("VP9"));
        engine.close().await;
    }

    #[tokio::test]
    async fn nonsense_is_an_error_and_not_a_panic() {
        let (mut engine, _events) = engine().await;
        assert!(engine.answer_offer("nonsense").await.is_err());
        assert!(engine.take_answer("v=0".to_owned()).await.is_err());
        engine.add_candidate(Side::Subscriber, "{").await;
        engine.add_candidate(Side::Subscriber, r#"{"candidate":""}"#).await;
        engine.add_candidate(Side::Subscriber, r#"{"candidate":"candidate:nonsense"}"#).await;
        engine.close().await;
    }

    #[tokio::test]
    async fn other_codecs_cannot_be_published() {
        let (engine, _events) = engine().await;
        assert!(matches!(
            engine.add_track(Codec::H264, "c").await.map(drop),
            Err(TransportError::UnsupportedCodec(Codec::H264))
        ));
        engine.close().await;
    }
}
