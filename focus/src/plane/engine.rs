//! All peers of the plane, without a socket and without a clock.
//!
//! The rule of use: after every `handle_*` call [`Engine::flush`], then take everything from
//! [`Engine::poll_transmit`] and [`Engine::poll_event`].

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use str0m::ice::StunMessage;
use str0m::media::{Mid, Rid};
use str0m::net::{DatagramSend, Protocol, Receive};
use str0m::rtp::RtpPacket;
use str0m::{Candidate, Input};

use super::counters::Counters;
use super::demux::Demux;
use super::forward::{Incoming, MAX_LAYERS, SenderClock};
use super::keyframes::KeyFrameGate;
use super::levels::AudioLevels;
use super::peer::{Peer, PeerError, Wishes};
use super::{Command, Event, MediaKind, PeerId, PeerRole, TrackKey};

/// How often levels, key frame wishes and deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Changes to a subscriber's session are gathered this long into one offer.
const GATHER: Duration = Duration::from_millis(10);
/// An engine that wants to be driven again at once waits this long: timers need no more than a millisecond.
const SOON: Duration = Duration::from_millis(1);

/// The plane's state.
pub(crate) struct Engine {
    candidates: Vec<Candidate>,
    addresses: Vec<SocketAddr>,
    max_peers: usize,
    counters: Arc<Counters>,
    peers: HashMap<PeerId, Slot>,
    tracks: HashMap<TrackKey, Track>,
    by_section: HashMap<(PeerId, Mid), TrackKey>,
    demux: Demux,
    timers: BTreeSet<(Instant, PeerId)>,
    offers: BTreeSet<(Instant, PeerId)>,
    dirty: BTreeSet<PeerId>,
    wishes: Wishes,
    next_tick: Instant,
}

struct Slot {
    peer: Peer,
    timer: Option<Instant>,
}

/// A published track.
struct Track {
    peer: PeerId,
    mid: Mid,
    kind: MediaKind,
    rids: Vec<Rid>,
    started: bool,
    levels: AudioLevels,
    gate: KeyFrameGate,
    subscribers: BTreeSet<PeerId>,
}

impl Track {
    fn layer(&self, rid: Option<Rid>) -> Option<u8> {
        if self.rids.is_empty() {
            return Some(0);
        }
        let index = self.rids.iter().position(|own| Some(*own) == rid)?;
        u8::try_from(index).ok()
    }
}

impl Engine {
    /// An engine whose peers are reached at `addresses` (never empty).
    pub(crate) fn new(
        now: Instant,
        addresses: Vec<SocketAddr>,
        candidates: Vec<Candidate>,
        max_peers: usize,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            candidates,
            addresses,
            max_peers,
            counters,
            peers: HashMap::new(),
            tracks: HashMap::new(),
            by_section: HashMap::new(),
            demux: Demux::default(),
            timers: BTreeSet::new(),
            offers: BTreeSet::new(),
            dirty: BTreeSet::new(),
            wishes: Wishes::default(),
            next_tick: now + TICK,
        }
    }

    /// Does what the control plane says.
    pub(crate) fn handle_command(&mut self, now: Instant, command: Command) {
        match command {
            Command::AddPeer { peer, role } => self.add_peer(now, peer, role),
            Command::RemovePeer { peer } => self.remove_peer(now, peer),
            Command::ApplyOffer { peer, sdp } => self.negotiate(now, peer, |p| p.answer(now, &sdp).map(Some)),
            Command::ApplyAnswer { peer, sdp } => {
                self.negotiate(now, peer, |p| p.accept(&sdp).map(|()| None));
                // Changes that came while the answer was awaited.
                self.offer_soon(now, peer);
            }
            Command::RestartIce { peer } => {
                self.negotiate(now, peer, |p| p.restart_ice().map(|()| p.offer()));
            }
            Command::Publish { peer, mid, track, kind, rids } => self.publish(peer, &mid, track, kind, &rids),
            Command::Unpublish { track } => self.unpublish(now, track),
            Command::Subscribe { peer, track, stream_id, track_id } => {
                self.subscribe(now, peer, track, stream_id, track_id);
            }
            Command::Unsubscribe { peer, track } => self.unsubscribe(now, peer, track),
            Command::SetForwarding { peer, track, paused, max_layer } => {
                self.with_peer(now, peer, |p| {
                    p.set_forwarding(track, paused, max_layer);
                    Ok(())
                });
                self.want_key_frame(now, peer, track);
            }
            Command::SendData { peer, channel, payload } => {
                if let Some(kept) = self.with_peer(now, peer, |p| p.send_data(channel, payload)) {
                    self.dirty.insert(peer);
                    if !kept {
                        self.counters.data_dropped.add(1);
                    }
                }
            }
        }
    }

    /// Takes a datagram from the socket.
    pub(crate) fn handle_datagram(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) {
        self.counters.datagrams_in.add(1);
        let destination = self.destination(source);
        // RFC 7983 §7: the first byte tells STUN from the rest.
        let is_stun = datagram.first().is_some_and(|byte| *byte < 4);
        let peer = if is_stun { self.stun_peer(source, datagram) } else { self.demux.by_address(source) };
        let Some(peer) = peer else {
            self.counters.garbage(source, "from nobody we know");
            return;
        };
        let Ok(receive) = Receive::new(Protocol::Udp, source, destination, datagram) else {
            self.counters.garbage(source, "of no known protocol");
            return;
        };
        let input = Input::Receive(now, receive);
        if is_stun && self.demux.by_address(source) != Some(peer) {
            let authentic = self.with_peer(now, peer, |p| Ok(p.authenticates(&input)));
            if authentic != Some(true) {
                self.counters.unauthenticated.add(1);
                return;
            }
            self.demux.bind(peer, source);
        }
        self.drive(now, peer, input);
        self.settle(now);
    }

    /// The peer that a STUN request names. We send no checks, so nothing else is for us.
    fn stun_peer(&self, source: SocketAddr, datagram: &[u8]) -> Option<PeerId> {
        let message = StunMessage::parse(datagram).ok()?;
        if !message.is_binding_request() {
            return None;
        }
        let (fragment, _) = message.split_username()?;
        let peer = self.demux.by_fragment(fragment);
        if peer.is_none() {
            tracing::trace!(%source, "a STUN request for a peer that is gone");
        }
        peer
    }

    /// Lets time pass.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, peer)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.remove(&(at, peer));
            if let Some(slot) = self.peers.get_mut(&peer) {
                slot.timer = None;
            }
            self.drive(now, peer, Input::Timeout(now));
            self.settle(now);
        }
        while let Some((at, peer)) = self.offers.first().copied()
            && at <= now
        {
            self.offers.remove(&(at, peer));
            self.offer_now(now, peer);
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.tick(now);
        }
    }

    /// Sends what was written to peers since the last flush. Writing several packets before one flush is
    /// cheaper than flushing each: the engine's cost is per drive and grows with a peer's sections.
    pub(crate) fn flush(&mut self, now: Instant) {
        while let Some(peer) = self.dirty.pop_first() {
            self.drive(now, peer, Input::Timeout(now));
            self.settle(now);
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) should be called next.
    pub(crate) fn poll_timeout(&self) -> Instant {
        let first = |set: &BTreeSet<(Instant, PeerId)>| set.first().map(|(at, _)| *at);
        let earliest = [first(&self.timers), first(&self.offers)].into_iter().flatten().min();
        earliest.map_or(self.next_tick, |at| at.min(self.next_tick))
    }

    /// A datagram to send.
    pub(crate) fn poll_transmit(&mut self) -> Option<(SocketAddr, DatagramSend)> {
        self.wishes.transmits.pop_front()
    }

    /// An event for the control plane.
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.wishes.events.pop_front()
    }

    /// Gives a peer up for a reason outside the engine.
    pub(crate) fn give_up(&mut self, now: Instant, peer: PeerId, reason: &str) {
        self.fail(now, peer, reason.to_owned());
    }
}

/// Peers.
impl Engine {
    fn add_peer(&mut self, now: Instant, peer: PeerId, role: PeerRole) {
        if self.peers.contains_key(&peer) {
            tracing::warn!(?peer, "a peer of this name exists already: the command is ignored");
            return;
        }
        if self.peers.len() >= self.max_peers {
            let reason = "this server has no room for another connection".to_owned();
            self.wishes.events.push_back(Event::Failed { peer, reason });
            return;
        }
        let candidates = &self.candidates;
        let made = catch_unwind(AssertUnwindSafe(|| {
            let mut made = Peer::new(now, peer, role, candidates);
            let fragment = made.fragment();
            (made, fragment)
        }));
        let Ok((made, fragment)) = made else {
            self.counters.panics.add(1);
            let reason = "the media engine could not make the connection".to_owned();
            self.wishes.events.push_back(Event::Failed { peer, reason });
            return;
        };
        self.demux.set_fragment(peer, fragment);
        self.peers.insert(peer, Slot { peer: made, timer: None });
        self.offer_now(now, peer);
        self.dirty.insert(peer);
    }

    fn remove_peer(&mut self, now: Instant, peer: PeerId) {
        let Some(slot) = self.peers.remove(&peer) else { return };
        if let Some(at) = slot.timer {
            self.timers.remove(&(at, peer));
        }
        self.offers.retain(|(_, other)| *other != peer);
        self.dirty.remove(&peer);
        self.demux.remove(peer);
        let owned: Vec<TrackKey> =
            self.tracks.iter().filter(|(_, track)| track.peer == peer).map(|(key, _)| *key).collect();
        for track in owned {
            self.unpublish(now, track);
        }
        for track in self.tracks.values_mut() {
            track.subscribers.remove(&peer);
        }
    }

    fn fail(&mut self, now: Instant, peer: PeerId, reason: String) {
        if !self.peers.contains_key(&peer) {
            return;
        }
        tracing::debug!(?peer, reason, "a peer failed");
        self.remove_peer(now, peer);
        self.wishes.events.push_back(Event::Failed { peer, reason });
    }

    /// Runs code on a peer behind a wall: its error or its panic costs only this peer.
    fn with_peer<T>(
        &mut self,
        now: Instant,
        peer: PeerId,
        run: impl FnOnce(&mut Peer) -> Result<T, PeerError>,
    ) -> Option<T> {
        let slot = self.peers.get_mut(&peer)?;
        match guarded(&self.counters, || run(&mut slot.peer)) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.fail(now, peer, reason);
                None
            }
        }
    }

    fn drive(&mut self, now: Instant, peer: PeerId, input: Input<'_>) {
        let Some(slot) = self.peers.get_mut(&peer) else { return };
        let wishes = &mut self.wishes;
        match guarded(&self.counters, || slot.peer.drive(now, input, wishes)) {
            Ok(next) => {
                let next = next.max(now + SOON);
                if slot.timer != Some(next) {
                    if let Some(old) = slot.timer.replace(next) {
                        self.timers.remove(&(old, peer));
                    }
                    self.timers.insert((next, peer));
                }
            }
            Err(reason) => self.fail(now, peer, reason),
        }
    }

    /// Passes on what driving a peer has brought.
    fn settle(&mut self, now: Instant) {
        while let Some((peer, packet)) = self.wishes.media.pop_front() {
            self.forward(now, peer, &packet);
        }
        for (peer, mid) in std::mem::take(&mut self.wishes.key_frames) {
            let Some(slot) = self.peers.get(&peer) else { continue };
            let Some(key) = slot.peer.track_of(mid) else { continue };
            let Some(layer) = slot.peer.layer_of(key) else { continue };
            if let Some(track) = self.tracks.get_mut(&key) {
                track.gate.want(layer);
                self.request_key_frames(now, key);
            }
        }
    }

    /// The local address that a packet was sent to. One socket serves all of them, so any of the sender's
    /// family will do: the answer leaves through the same socket.
    fn destination(&self, source: SocketAddr) -> SocketAddr {
        let same = self.addresses.iter().find(|address| address.is_ipv4() == source.is_ipv4());
        same.or_else(|| self.addresses.first()).copied().unwrap_or(source)
    }

    fn tick(&mut self, now: Instant) {
        for (track, state) in &mut self.tracks {
            if let Some(level) = state.levels.poll(now) {
                self.wishes.events.push_back(Event::AudioLevel {
                    track: *track,
                    level: level.loudest,
                    active_share: level.active_share,
                });
            }
        }
        let late: Vec<(PeerId, String)> = self
            .peers
            .iter()
            .filter_map(|(id, slot)| slot.peer.check(now).err().map(|error| (*id, error.to_string())))
            .collect();
        for (peer, reason) in late {
            self.fail(now, peer, reason);
        }
        let wishes: Vec<(PeerId, TrackKey)> = self
            .tracks
            .iter()
            .filter(|(_, track)| track.kind == MediaKind::Video)
            .flat_map(|(key, track)| track.subscribers.iter().map(|peer| (*peer, *key)))
            .collect();
        for (peer, track) in wishes {
            self.want_key_frame(now, peer, track);
        }
        // A request that came too early is due some time later.
        for track in self.tracks.keys().copied().collect::<Vec<_>>() {
            self.request_key_frames(now, track);
        }
    }
}

fn guarded<T>(counters: &Counters, run: impl FnOnce() -> Result<T, PeerError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => {
            counters.panics.add(1);
            Err("the media engine failed on what this client sent".to_owned())
        }
    }
}

/// Negotiation.
impl Engine {
    fn negotiate(
        &mut self,
        now: Instant,
        peer: PeerId,
        run: impl FnOnce(&mut Peer) -> Result<Option<Event>, PeerError>,
    ) {
        // A description that cannot be used costs an error, only a panic costs the peer.
        let mut outcome = None;
        let ran = self.with_peer(now, peer, |p| {
            outcome = Some(run(p));
            Ok(p.fragment())
        });
        let (Some(fragment), Some(outcome)) = (ran, outcome) else { return };
        // An ICE restart by the client gives us new credentials.
        self.demux.set_fragment(peer, fragment);
        match outcome {
            Ok(event) => self.wishes.events.extend(event),
            Err(error) => {
                self.wishes.events.push_back(Event::Rejected { peer, reason: error.to_string() });
            }
        }
        self.dirty.insert(peer);
    }

    fn offer_soon(&mut self, now: Instant, peer: PeerId) {
        if !self.offers.iter().any(|(_, other)| *other == peer) {
            self.offers.insert((now + GATHER, peer));
        }
    }

    fn offer_now(&mut self, now: Instant, peer: PeerId) {
        if let Some(Some(offer)) = self.with_peer(now, peer, |p| Ok(p.offer())) {
            self.wishes.events.push_back(offer);
            self.dirty.insert(peer);
        }
    }
}

/// Tracks.
impl Engine {
    fn publish(&mut self, peer: PeerId, mid: &str, track: TrackKey, kind: MediaKind, rids: &[String]) {
        if !self.peers.contains_key(&peer) || self.tracks.contains_key(&track) {
            tracing::debug!(?peer, ?track, "a publication without a peer or made twice is ignored");
            return;
        }
        let mid = Mid::from(mid);
        self.by_section.insert((peer, mid), track);
        let rids = rids.iter().take(MAX_LAYERS).map(|rid| Rid::from(rid.as_str())).collect();
        self.tracks.insert(
            track,
            Track {
                peer,
                mid,
                kind,
                rids,
                started: false,
                levels: AudioLevels::default(),
                gate: KeyFrameGate::default(),
                subscribers: BTreeSet::new(),
            },
        );
    }

    fn unpublish(&mut self, now: Instant, key: TrackKey) {
        let Some(track) = self.tracks.remove(&key) else { return };
        let section = (track.peer, track.mid);
        if self.by_section.get(&section) == Some(&key) {
            self.by_section.remove(&section);
        }
        for peer in track.subscribers {
            self.end_subscription(now, peer, key);
        }
    }

    fn subscribe(&mut self, now: Instant, peer: PeerId, key: TrackKey, stream_id: String, track_id: String) {
        let Some(kind) = self.tracks.get(&key).map(|track| track.kind) else {
            tracing::debug!(?peer, track = ?key, "a subscription to a track that is gone is ignored");
            return;
        };
        let subscribed = self.with_peer(now, peer, |p| p.subscribe(key, kind, stream_id, track_id));
        // A failing peer may take the track with it.
        if let (Some(()), Some(track)) = (subscribed, self.tracks.get_mut(&key)) {
            track.subscribers.insert(peer);
            self.offer_soon(now, peer);
        }
    }

    fn unsubscribe(&mut self, now: Instant, peer: PeerId, key: TrackKey) {
        if let Some(track) = self.tracks.get_mut(&key)
            && track.subscribers.remove(&peer)
        {
            self.end_subscription(now, peer, key);
        }
    }

    fn end_subscription(&mut self, now: Instant, peer: PeerId, key: TrackKey) {
        if let Some(true) = self.with_peer(now, peer, |p| Ok(p.unsubscribe(key))) {
            self.offer_soon(now, peer);
        }
    }

    fn forward(&mut self, now: Instant, publisher: PeerId, packet: &RtpPacket) {
        let ssrc = packet.header.ssrc;
        let Some(Some((mid, rid))) = self.with_peer(now, publisher, |p| Ok(p.stream(ssrc))) else { return };
        let Some(key) = self.by_section.get(&(publisher, mid)).copied() else { return };
        let Some(track) = self.tracks.get_mut(&key) else { return };
        let Some(layer) = track.layer(rid) else { return };
        if !track.started && !packet.payload.is_empty() {
            track.started = true;
            self.wishes.events.push_back(Event::TrackStarted { track: key });
        }
        if track.kind == MediaKind::Audio
            && let Some(level) = packet.header.ext_vals.audio_level
        {
            track.levels.observe(now, packet.header.timestamp, level.unsigned_abs());
        }
        let incoming = Incoming {
            layer,
            ssrc: *ssrc,
            sequence: *packet.seq_no,
            timestamp: packet.header.timestamp,
            payload: &packet.payload,
            clock: clock(packet),
        };
        let mut failed = vec![];
        for subscriber in &track.subscribers {
            let Some(slot) = self.peers.get_mut(subscriber) else { continue };
            match guarded(&self.counters, || Ok(slot.peer.forward(now, key, &incoming, packet))) {
                Ok(true) => {
                    self.dirty.insert(*subscriber);
                }
                Ok(false) => {}
                Err(reason) => failed.push((*subscriber, reason)),
            }
        }
        for (peer, reason) in failed {
            self.fail(now, peer, reason);
        }
    }

    fn want_key_frame(&mut self, now: Instant, peer: PeerId, key: TrackKey) {
        let Some(slot) = self.peers.get_mut(&peer) else { return };
        let Some(layer) = slot.peer.wants_key_frame(now, key) else { return };
        if let Some(track) = self.tracks.get_mut(&key) {
            track.gate.want(layer);
            self.request_key_frames(now, key);
        }
    }

    fn request_key_frames(&mut self, now: Instant, key: TrackKey) {
        while let Some(track) = self.tracks.get_mut(&key)
            && let Some(layer) = track.gate.poll(now)
        {
            let (peer, mid) = (track.peer, track.mid);
            let rid = track.rids.get(usize::from(layer)).copied();
            self.with_peer(now, peer, |p| {
                p.request_key_frame(mid, rid);
                Ok(())
            });
            self.dirty.insert(peer);
            self.counters.key_frames_requested.add(1);
        }
    }
}

/// The sender's clock, in the packet's 32-bit timestamps.
fn clock(packet: &RtpPacket) -> Option<SenderClock> {
    let report = packet.last_sender_info.as_ref()?;
    let wall = report.ntp_time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(SenderClock {
        wall_micros: u64::try_from(wall.as_micros()).ok()?,
        // The wire carries the low 32 bits of the engine's extended time.
        timestamp: report.rtp_time.numer() as u32,
    })
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
mod tests {
    use str0m::change::SdpOffer;
    use str0m::{Output, Rtc, RtcConfig};

    use super::*;

    fn plane() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 1))
    }

    fn client() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 2))
    }

    fn engine(now: Instant) -> Engine {
        let candidates = vec![Candidate::host(plane(), "udp").unwrap()];
        Engine::new(now, vec![plane()], candidates, 2, Arc::new(Counters::default()))
    }

    fn events(engine: &mut Engine) -> Vec<Event> {
        std::iter::from_fn(|| engine.poll_event()).collect()
    }

    fn said(client_rtc: &mut Rtc) -> Vec<Vec<u8>> {
        let mut datagrams = vec![];
        loop {
            match client_rtc.poll_output().unwrap() {
                Output::Timeout(_) => return datagrams,
                Output::Transmit(t) => datagrams.push(t.contents.to_vec()),
                Output::Event(_) => {}
            }
        }
    }

    /// Lets `time` pass for both, on a network without delay.
    fn pass(engine: &mut Engine, client_rtc: &mut Rtc, now: &mut Instant, time: Duration) -> Vec<Event> {
        let end = *now + time;
        let mut seen = vec![];
        while *now < end {
            let mut quiet = false;
            while !quiet {
                quiet = true;
                client_rtc.handle_input(Input::Timeout(*now)).unwrap();
                for datagram in said(client_rtc) {
                    engine.handle_datagram(*now, client(), &datagram);
                    quiet = false;
                }
                engine.handle_timeout(*now);
                engine.flush(*now);
                while let Some((_, datagram)) = engine.poll_transmit() {
                    let receive = Receive::new(Protocol::Udp, plane(), client(), &datagram).unwrap();
                    client_rtc.handle_input(Input::Receive(*now, receive)).unwrap();
                    for datagram in said(client_rtc) {
                        engine.handle_datagram(*now, client(), &datagram);
                    }
                    quiet = false;
                }
                seen.extend(events(engine));
            }
            *now += Duration::from_millis(20);
        }
        seen
    }

    #[test]
    fn a_peer_that_goes_silent_fails_after_its_grace() {
        let mut now = Instant::now();
        let mut engine = engine(now);
        let peer = PeerId(1);
        engine.handle_command(now, Command::AddPeer { peer, role: PeerRole::Subscriber });
        let Some(Event::Offer { sdp, .. }) = events(&mut engine).pop() else { panic!("no offer") };
        let mut rtc = RtcConfig::new().build(now);
        rtc.add_local_candidate(Candidate::host(client(), "udp").unwrap());
        let answer = rtc.sdp_api().accept_offer(SdpOffer::from_sdp_string(&sdp).unwrap()).unwrap();
        engine.handle_command(now, Command::ApplyAnswer { peer, sdp: answer.to_sdp_string() });
        let seen = pass(&mut engine, &mut rtc, &mut now, Duration::from_secs(5));
        assert!(matches!(seen[..], [Event::Connected { .. }]), "{seen:?}");
        let seen = pass(&mut engine, &mut rtc, &mut now, Duration::from_secs(120));
        assert!(seen.is_empty(), "a living peer stays, {seen:?}");

        engine.handle_command(now, Command::RestartIce { peer });
        let Some(Event::Offer { sdp: again, .. }) = events(&mut engine).pop() else { panic!("no offer") };
        let fragment =
            |sdp: &str| sdp.lines().find(|line| line.starts_with("a=ice-ufrag:")).map(str::to_owned);
        assert_ne!(fragment(&again), fragment(&sdp));
        let answer = rtc.sdp_api().accept_offer(SdpOffer::from_sdp_string(&again).unwrap()).unwrap();
        engine.handle_command(now, Command::ApplyAnswer { peer, sdp: answer.to_sdp_string() });
        let seen = pass(&mut engine, &mut rtc, &mut now, Duration::from_secs(60));
        assert!(seen.is_empty(), "the new ICE session carries on, {seen:?}");
        let fell_silent = now;
        let failed = loop {
            now = engine.poll_timeout().max(now);
            engine.handle_timeout(now);
            engine.flush(now);
            if let Some(event) = engine.poll_event() {
                break event;
            }
            assert!(now - fell_silent < Duration::from_secs(30), "it lives for ever");
        };
        assert!(matches!(failed, Event::Failed { peer: p, .. } if p == peer), "{failed:?}");
        assert!(now - fell_silent > Duration::from_secs(5), "a hiccup is no failure");
        assert!(engine.peers.is_empty() && engine.timers.is_empty());
        assert_eq!(engine.demux.by_address(client()), None);
    }

    #[test]
    fn who_never_connects_is_given_up_and_who_has_nothing_to_send_is_not() {
        let now = Instant::now();
        let mut engine = engine(now);
        engine.handle_command(now, Command::AddPeer { peer: PeerId(1), role: PeerRole::Subscriber });
        engine.handle_command(now, Command::AddPeer { peer: PeerId(2), role: PeerRole::Publisher });
        assert_eq!(events(&mut engine).len(), 1, "one offer");
        engine.handle_timeout(now + Duration::from_secs(59));
        assert!(events(&mut engine).is_empty());
        engine.handle_timeout(now + Duration::from_secs(61));
        let failed = events(&mut engine);
        assert!(matches!(failed[..], [Event::Failed { peer: PeerId(1), .. }]), "{failed:?}");
        assert!(engine.peers.contains_key(&PeerId(2)));
    }

    #[test]
    fn an_offer_that_got_lost_is_made_again() {
        let mut now = Instant::now();
        let mut engine = engine(now);
        let peer = PeerId(1);
        engine.handle_command(now, Command::AddPeer { peer, role: PeerRole::Subscriber });
        assert_eq!(events(&mut engine).len(), 1);
        engine.handle_command(now, Command::RestartIce { peer });
        let Some(Event::Offer { sdp, .. }) = events(&mut engine).pop() else { panic!("no offer") };
        let mut rtc = RtcConfig::new().build(now);
        rtc.add_local_candidate(Candidate::host(client(), "udp").unwrap());
        let answer = rtc.sdp_api().accept_offer(SdpOffer::from_sdp_string(&sdp).unwrap()).unwrap();
        engine.handle_command(now, Command::ApplyAnswer { peer, sdp: answer.to_sdp_string() });
        let seen = pass(&mut engine, &mut rtc, &mut now, Duration::from_secs(5));
        assert!(matches!(seen[..], [Event::Connected { .. }]), "{seen:?}");
        let payload = bytes::Bytes::from_static(b"x");
        let channel = crate::plane::Channel::Reliable;
        engine.handle_command(now, Command::SendData { peer, channel, payload });
        engine.flush(now);
        assert!(engine.poll_transmit().is_some(), "its data channels are open");
    }

    #[test]
    fn a_full_plane_refuses_another_peer() {
        let now = Instant::now();
        let mut engine = engine(now);
        for id in 1..=3 {
            engine.handle_command(now, Command::AddPeer { peer: PeerId(id), role: PeerRole::Publisher });
        }
        let failed = events(&mut engine);
        assert!(matches!(failed[..], [Event::Failed { peer: PeerId(3), .. }]), "{failed:?}");
        engine.handle_command(now, Command::RemovePeer { peer: PeerId(1) });
        engine.handle_command(now, Command::AddPeer { peer: PeerId(4), role: PeerRole::Publisher });
        assert!(events(&mut engine).is_empty());
    }

    #[test]
    fn a_panic_costs_one_peer() {
        let now = Instant::now();
        let mut engine = engine(now);
        engine.handle_command(now, Command::AddPeer { peer: PeerId(1), role: PeerRole::Publisher });
        engine.handle_command(now, Command::AddPeer { peer: PeerId(2), role: PeerRole::Publisher });
        let none: Option<()> = engine.with_peer(now, PeerId(1), |_| panic!("as an engine may"));
        assert!(none.is_none());
        let failed = events(&mut engine);
        assert!(matches!(failed[..], [Event::Failed { peer: PeerId(1), .. }]), "{failed:?}");
        assert_eq!(engine.counters.panics.count(), 1);
        assert!(engine.peers.contains_key(&PeerId(2)));
    }

    #[test]
    fn commands_about_nobody_are_ignored() {
        let now = Instant::now();
        let mut engine = engine(now);
        let (peer, track) = (PeerId(7), TrackKey(7));
        let ids = || (String::new(), String::new());
        for command in [
            Command::RemovePeer { peer },
            Command::ApplyOffer { peer, sdp: String::new() },
            Command::ApplyAnswer { peer, sdp: String::new() },
            Command::Publish { peer, mid: "1".into(), track, kind: MediaKind::Audio, rids: vec![] },
            Command::Unpublish { track },
            Command::Subscribe { peer, track, stream_id: ids().0, track_id: ids().1 },
            Command::Unsubscribe { peer, track },
            Command::SetForwarding { peer, track, paused: true, max_layer: 0 },
            Command::SendData { peer, channel: crate::plane::Channel::Lossy, payload: bytes::Bytes::new() },
        ] {
            engine.handle_command(now, command);
            engine.flush(now);
        }
        assert!(events(&mut engine).is_empty());
    }
}
