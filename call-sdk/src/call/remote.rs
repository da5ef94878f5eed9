//! Frames on their way in: attributed to a member and opened with that member's key, or dropped.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::{
    frame_crypto::{FrameDecryptor, KeyRing, OpenError, Opened},
    key::KeyIndex,
    media::{Codec, EncodedFrame, TrackSource},
    member::{LiveKitFocus, ParticipantIdentity},
    transport::{RemoteTrack, TrackSid, WireFrame},
};

/// Every remote track and every remote key ring of a call.
#[derive(Debug, Default)]
pub(super) struct Remote {
    rings: HashMap<ParticipantIdentity, KeyRing>,
    tracks: BTreeMap<(LiveKitFocus, TrackSid), Track>,
}

#[derive(Debug)]
struct Track {
    identity: ParticipantIdentity,
    info: RemoteTrack,
    decryptor: Option<(Codec, FrameDecryptor)>,
    clock: MediaClock,
}

/// What became of a frame.
pub(super) enum Inbound {
    /// It opened (or the call is not encrypted).
    Frame { track: RemoteTrack, frame: EncodedFrame, index: Option<KeyIndex> },
    /// It did not open.
    Refused { source: TrackSource, reason: OpenError },
    /// It is empty and says nothing.
    Silent,
}

impl Remote {
    /// The key ring of a participant. Rings outlive tracks: a key may come before the first track.
    pub(super) fn ring(&mut self, identity: &ParticipantIdentity) -> KeyRing {
        self.rings.entry(identity.clone()).or_default().clone()
    }

    /// Wipes the keys of a participant who left the call.
    pub(super) fn forget_keys(&mut self, identity: &ParticipantIdentity) {
        if let Some(ring) = self.rings.remove(identity) {
            ring.clear();
        }
        // Decryptors hold clones of the wiped ring; a rejoin must start with the new one.
        for track in self.tracks.values_mut().filter(|t| t.identity == *identity) {
            track.decryptor = None;
        }
    }

    /// Wipes keys that have been out of use for a minute.
    pub(super) fn retire_keys(&self, now: Instant) {
        for ring in self.rings.values() {
            ring.retire(now);
        }
    }

    pub(super) fn update_track(
        &mut self,
        focus: LiveKitFocus,
        identity: ParticipantIdentity,
        info: RemoteTrack,
    ) {
        let track = self.tracks.entry((focus, info.sid.clone())).or_insert_with(|| Track {
            identity: identity.clone(),
            info: info.clone(),
            decryptor: None,
            clock: MediaClock::default(),
        });
        if track.identity != identity {
            // The SFU moved a sid to somebody else: nothing of the old owner may be used for the new one.
            track.decryptor = None;
            track.identity = identity;
        }
        track.info = info;
    }

    pub(super) fn end_track(&mut self, focus: &LiveKitFocus, sid: &TrackSid) {
        self.tracks.remove(&(focus.clone(), sid.clone()));
    }

    /// Forgets every track that came over a focus, and returns who published what.
    pub(super) fn end_focus(&mut self, focus: &LiveKitFocus) -> Vec<(ParticipantIdentity, TrackSid)> {
        let ended: Vec<_> = self.tracks.keys().filter(|(f, _)| f == focus).cloned().collect();
        ended.into_iter().filter_map(|key| self.tracks.remove(&key).map(|t| (t.identity, key.1))).collect()
    }

    /// The tracks that a participant publishes on a focus.
    pub(super) fn tracks_of(&self, focus: &LiveKitFocus, identity: &ParticipantIdentity) -> Vec<RemoteTrack> {
        let of_them =
            |(key, t): &(&(LiveKitFocus, TrackSid), &Track)| key.0 == *focus && t.identity == *identity;
        self.tracks.iter().filter(of_them).map(|(_, t)| t.info.clone()).collect()
    }

    /// Opens a frame with the key ring of the participant that the SFU names; the caller has made sure that this
    /// participant is a member.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        from: (&LiveKitFocus, &ParticipantIdentity, &TrackSid),
        codec: Codec,
        wire: &WireFrame,
        encrypted: bool,
    ) -> Inbound {
        let (focus, identity, sid) = from;
        let ring = self.ring(identity);
        let track = self.tracks.entry((focus.clone(), sid.clone())).or_insert_with(|| Track {
            identity: identity.clone(),
            info: RemoteTrack {
                sid: sid.clone(),
                source: TrackSource::Unknown,
                codec: Some(codec),
                announced_encrypted: false,
                muted: false,
            },
            decryptor: None,
            clock: MediaClock::default(),
        });
        if track.identity != *identity {
            track.decryptor = None;
            track.identity = identity.clone();
        }
        let timestamp = track.clock.time(wire.rtp_timestamp, codec.clock_rate());
        if !encrypted {
            let frame = EncodedFrame { payload: wire.payload.clone(), timestamp };
            return Inbound::Frame { track: track.info.clone(), frame, index: None };
        }
        if track.decryptor.as_ref().is_none_or(|(c, _)| *c != codec) {
            match FrameDecryptor::new(codec, ring) {
                Ok(decryptor) => track.decryptor = Some((codec, decryptor)),
                // Nobody can seal this codec, so whatever it is, it is not sealed.
                Err(_) => {
                    return Inbound::Refused { source: track.info.source, reason: OpenError::NotSealed };
                }
            }
        }
        let Some((_, decryptor)) = &mut track.decryptor else { return Inbound::Silent };
        let mut plain = Vec::new();
        // The transport has dropped what the SFU injects, so no trailer is expected here.
        match decryptor.open(now, &wire.payload, None, &mut plain) {
            Ok(Opened::Frame(index)) => {
                let frame = EncodedFrame { payload: Bytes::from(plain), timestamp };
                Inbound::Frame { track: track.info.clone(), frame, index: Some(index) }
            }
            Ok(_) => Inbound::Silent,
            Err(reason) => Inbound::Refused { source: track.info.source, reason },
        }
    }
}

/// Turns RTP timestamps, which wrap, into media time since the first frame.
#[derive(Debug, Default)]
struct MediaClock {
    last: Option<(u32, i64)>,
}

impl MediaClock {
    fn time(&mut self, rtp: u32, clock_rate: u32) -> Duration {
        let elapsed = match self.last {
            None => 0,
            // The difference as a signed number keeps slightly older frames older (RFC 3550 §A.1).
            Some((last, elapsed)) => elapsed + i64::from(rtp.wrapping_sub(last).cast_signed()),
        };
        self.last = Some((rtp, elapsed));
        let ticks = u64::try_from(elapsed).unwrap_or_default();
        Duration::from_nanos(ticks.saturating_mul(1_000_000) / u64::from(clock_rate / 1_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{frame_crypto::FrameEncryptor, key::MediaKey};

    fn focus() -> LiveKitFocus {
        LiveKitFocus { service_url: "https://focus.example".to_owned() }
    }

    fn named(name: &str) -> ParticipantIdentity {
        ParticipantIdentity(name.to_owned())
    }

    fn sealed(key: u8, plain: &[u8]) -> WireFrame {
        let ring = KeyRing::new();
        ring.set(KeyIndex(0), &MediaKey::new(vec![key; 16]).unwrap()).unwrap();
        let mut out = Vec::new();
        FrameEncryptor::new(Codec::Opus, ring).unwrap().seal(KeyIndex(0), plain, &mut out).unwrap();
        WireFrame { payload: out.into(), rtp_timestamp: 960 }
    }

    #[test]
    fn a_frame_opens_only_with_the_key_of_the_one_it_is_attributed_to() {
        let (alice, bob, sid) = (named("alice"), named("bob"), TrackSid("TR_1".to_owned()));
        let mut remote = Remote::default();
        remote.ring(&alice).set(KeyIndex(0), &MediaKey::new(vec![1; 16]).unwrap()).unwrap();
        remote.ring(&bob).set(KeyIndex(0), &MediaKey::new(vec![2; 16]).unwrap()).unwrap();
        let wire = sealed(1, b"hello opus");
        let now = Instant::now();
        let as_bob = remote.receive(now, (&focus(), &bob, &sid), Codec::Opus, &wire, true);
        assert!(matches!(as_bob, Inbound::Refused { reason: OpenError::Unauthentic(_), .. }));
        // The SFU changes its mind about whose track this is: only the right key opens it.
        let as_alice = remote.receive(now, (&focus(), &alice, &sid), Codec::Opus, &wire, true);
        assert!(matches!(as_alice, Inbound::Frame { frame, .. } if &frame.payload[..] == b"hello opus"));
    }

    #[test]
    fn plaintext_never_comes_out_of_an_encrypted_call() {
        let (alice, sid) = (named("alice"), TrackSid("TR_1".to_owned()));
        let mut remote = Remote::default();
        remote.ring(&alice).set(KeyIndex(0), &MediaKey::new(vec![1; 16]).unwrap()).unwrap();
        let plain = WireFrame { payload: Bytes::from_static(&[0x78; 100]), rtp_timestamp: 0 };
        let got = remote.receive(Instant::now(), (&focus(), &alice, &sid), Codec::Opus, &plain, true);
        assert!(matches!(got, Inbound::Refused { .. }));
    }

    #[test]
    fn keys_of_a_member_who_left_open_nothing_more() {
        let (alice, sid) = (named("alice"), TrackSid("TR_1".to_owned()));
        let mut remote = Remote::default();
        remote.ring(&alice).set(KeyIndex(0), &MediaKey::new(vec![1; 16]).unwrap()).unwrap();
        let now = Instant::now();
        let first = remote.receive(now, (&focus(), &alice, &sid), Codec::Opus, &sealed(1, b"before"), true);
        assert!(matches!(first, Inbound::Frame { .. }));
        remote.forget_keys(&alice);
        let second = remote.receive(now, (&focus(), &alice, &sid), Codec::Opus, &sealed(1, b"after"), true);
        assert!(matches!(second, Inbound::Refused { reason: OpenError::MissingKey(_), .. }));
    }

    #[test]
    fn media_time_survives_the_wrap_of_rtp_time() {
        let mut clock = MediaClock::default();
        let start = u32::MAX - 480;
        assert_eq!(clock.time(start, 48_000), Duration::ZERO);
        assert_eq!(clock.time(start.wrapping_add(960), 48_000), Duration::from_millis(20));
    }
}
