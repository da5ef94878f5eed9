//! The media plane: peers, packets and nothing else.
//!
//! Control plane and media plane talk by the messages of this module only. Commands go down, events come up;
//! both travel on bounded channels. No command has a direct reply: what it leads to is an [`Event`].
//!
//! [`MediaPlane`] is one thread with one UDP socket. Inside, nothing but the shell touches socket or clock.
//!
//! What it refuses to do: it forwards Opus and VP8 and negotiates nothing else; it has no key and reads of an
//! encrypted frame only what its packetiser wrote in front of it and the one bit that marks a key frame; it never
//! trickles candidates and sends no ICE checks (ICE-lite); it keeps no trace of a packet whose sender has not
//! proved to know a peer's ICE password; a section of a subscriber's session is never reused for another track
//! (the engine below cannot), so a subscriber that has seen 250 tracks is made to connect anew.

mod counters;
mod demux;
mod engine;
mod forward;
mod keyframes;
mod levels;
mod outbox;
mod peer;
mod shell;
mod vp8;

use bytes::Bytes;

pub use counters::{Counter, Counters};
pub use shell::{MediaPlane, PlaneConfig, PlaneError};

/// One peer connection. Chosen by the control plane, never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

/// One published track, whatever its layers. Chosen by the control plane, never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrackKey(pub u64);

/// Who offers on a peer connection (signalling v0 has one of each per participant).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// The client offers and sends media and data.
    Publisher,
    /// We offer, open `_reliable` and `_lossy`, and send media and data.
    Subscriber,
}

/// Sound or picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// An audio section.
    Audio,
    /// A video section.
    Video,
}

/// The two data channels that every LiveKit client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// `_reliable`: ordered, retransmitted.
    Reliable,
    /// `_lossy`: unordered, never retransmitted.
    Lossy,
}

/// From the control plane to the media plane.
#[derive(Debug)]
#[non_exhaustive]
pub enum Command {
    /// Makes a peer. A subscriber peer answers with [`Event::Offer`] at once, for its data channels.
    AddPeer {
        /// Its name from now on.
        peer: PeerId,
        /// Who offers on it.
        role: PeerRole,
    },
    /// Closes a peer, its tracks and its subscriptions. Unknown peers are ignored.
    RemovePeer {
        /// Which.
        peer: PeerId,
    },
    /// A client's offer on a publisher peer: answered by [`Event::Answered`] or [`Event::Rejected`].
    ApplyOffer {
        /// Which.
        peer: PeerId,
        /// The SDP text as it came.
        sdp: String,
    },
    /// A client's answer on a subscriber peer; [`Event::Rejected`] if it is unusable.
    ApplyAnswer {
        /// Which.
        peer: PeerId,
        /// The SDP text as it came.
        sdp: String,
    },
    /// Begins a new ICE session on a subscriber peer, whose client has lost its signalling or its network: leads to
    /// an [`Event::Offer`] with new ICE credentials. An offer still unanswered is withdrawn; its answer, should it
    /// come, must not be applied any more.
    RestartIce {
        /// Which.
        peer: PeerId,
    },
    /// Binds what arrives on a section of a publisher peer to a track.
    Publish {
        /// The publisher peer.
        peer: PeerId,
        /// The section.
        mid: String,
        /// The track that it feeds.
        track: TrackKey,
        /// What it carries.
        kind: MediaKind,
        /// Layers by quality, low to high: the rid of each, empty if the section is not simulcast.
        rids: Vec<String>,
    },
    /// Ends a track and every subscription to it.
    Unpublish {
        /// Which.
        track: TrackKey,
    },
    /// Forwards a track to a subscriber peer; leads to an [`Event::Offer`] that carries it, unless it was unsubscribed
    /// so recently that the client has not been told. A track that was subscribed before comes back in its old
    /// section under its old ids. A track that is not published is ignored.
    Subscribe {
        /// The subscriber peer.
        peer: PeerId,
        /// The track.
        track: TrackKey,
        /// First token of `a=msid`, for instance `PA_x|TR_y`.
        stream_id: String,
        /// Second token of `a=msid`, for instance `TR_y`.
        track_id: String,
    },
    /// Stops forwarding a track to a peer and makes its section inactive.
    Unsubscribe {
        /// The subscriber peer.
        peer: PeerId,
        /// The track.
        track: TrackKey,
    },
    /// Pauses or resumes a subscription and limits its layer; at first it is not paused and has the best layer.
    /// Ignored before [`Command::Subscribe`].
    SetForwarding {
        /// The subscriber peer.
        peer: PeerId,
        /// The track.
        track: TrackKey,
        /// No packet is forwarded while this is true.
        paused: bool,
        /// Index of the highest simulcast layer wanted, 0 = lowest.
        max_layer: u8,
    },
    /// Sends one message on a data channel; queued (bounded) until the channel is open.
    SendData {
        /// The subscriber peer.
        peer: PeerId,
        /// Which channel.
        channel: Channel,
        /// The message.
        payload: Bytes,
    },
}

/// A media section of a client's offer, as far as the control plane cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedSection {
    /// `a=mid`.
    pub mid: String,
    /// Sound or picture.
    pub kind: MediaKind,
    /// Whether the client sends on it (sendrecv or sendonly, and not rejected).
    pub sends: bool,
    /// Second token of `a=msid` (else the only one): the MediaStreamTrack id that `AddTrackRequest.cid` names.
    pub track_id: Option<String>,
    /// Negotiated MIME types in the answer's order, for instance `video/VP8`; no `rtx`.
    pub mimes: Vec<String>,
    /// Simulcast rids in the offer's order.
    pub rids: Vec<String>,
}

/// From the media plane to the control plane.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// The answer to a client's offer.
    Answered {
        /// Which publisher peer.
        peer: PeerId,
        /// Our answer.
        sdp: String,
        /// What the offer held.
        sections: Vec<OfferedSection>,
    },
    /// Our offer to a client. The next one comes only after its answer.
    Offer {
        /// Which subscriber peer.
        peer: PeerId,
        /// The SDP text.
        sdp: String,
        /// Which section carries which track.
        mids: Vec<(String, TrackKey)>,
    },
    /// A client's SDP could not be used: its fault.
    Rejected {
        /// Whose.
        peer: PeerId,
        /// What was wrong, for the log and for the client.
        reason: String,
    },
    /// ICE and DTLS are up.
    Connected {
        /// Which.
        peer: PeerId,
    },
    /// The peer is gone: ICE went silent, DTLS failed or the engine gave up. The peer has been removed.
    Failed {
        /// Which.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// A message came on a data channel.
    Data {
        /// From which peer.
        peer: PeerId,
        /// On which channel.
        channel: Channel,
        /// The message.
        payload: Bytes,
    },
    /// The first media packet of a track came.
    TrackStarted {
        /// Which.
        track: TrackKey,
    },
    /// How loud a track was over the last 400 ms, from the audio-level header extension (RFC 6464).
    AudioLevel {
        /// Which.
        track: TrackKey,
        /// −dBov of its loudest packet: 0 is the loudest, 127 is silence.
        level: u8,
        /// Share of the interval that was at or above −35 dBov, 0.0..=1.0.
        active_share: f32,
    },
}
