//! Rooms and a scripted plane, on time driven by hand.
#![allow(clippy::disallowed_methods, reason = "virtual time needs one instant to count from")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use antiphon_focus::observe::Counters;
use antiphon_focus::plane::{Command, Event};
use antiphon_focus::room::{Join, JoinError, Now, Output, Presence, Rooms, SessionId, Settings};
use antiphon_focus::token::Claims;
use livekit_protocol::{ClientInfo, signal_request::Message as Up, signal_response::Message as Down};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::plane::ScriptedPlane;

pub(crate) struct Machine {
    pub(crate) rooms: Rooms,
    pub(crate) plane: ScriptedPlane,
    pub(crate) now: Now,
    /// What each session was sent, in order.
    pub(crate) sent: BTreeMap<SessionId, Vec<Down>>,
    pub(crate) closed: Vec<SessionId>,
    pub(crate) data: Vec<Command>,
    /// Who came and went, in order.
    pub(crate) presence: Vec<Presence>,
    pub(crate) counters: Arc<Counters>,
    events: VecDeque<Event>,
}

impl Machine {
    pub(crate) fn new(change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::default();
        settings.auto_create = true;
        change(&mut settings);
        let counters = Arc::new(Counters::default());
        let keys = Arc::new(super::keys());
        let rooms = Rooms::new(settings, keys, Arc::clone(&counters), StdRng::seed_from_u64(1));
        Self {
            rooms,
            plane: ScriptedPlane::default(),
            now: Now { instant: Instant::now(), unix: Duration::from_secs(1_800_000_000) },
            sent: BTreeMap::new(),
            closed: Vec::new(),
            data: Vec::new(),
            presence: Vec::new(),
            counters,
            events: VecDeque::new(),
        }
    }

    pub(crate) fn join(&mut self, identity: &str) -> SessionId {
        self.try_join(super::claims(identity, |_| {}), |_| {}).unwrap()
    }

    pub(crate) fn try_join(
        &mut self,
        claims: Claims,
        change: impl FnOnce(&mut Join),
    ) -> Result<SessionId, JoinError> {
        let client = ClientInfo { protocol: 17, client_protocol: 2, ..ClientInfo::default() };
        let mut join = Join { claims, client, auto_subscribe: true, adaptive_stream: false };
        change(&mut join);
        let joined = self.rooms.join(self.now, join);
        self.settle();
        joined
    }

    /// A client that answers our offer at once, and so becomes active.
    pub(crate) fn join_active(&mut self, identity: &str) -> SessionId {
        let session = self.join(identity);
        self.answer(session);
        session
    }

    pub(crate) fn up(&mut self, session: SessionId, message: Up) {
        self.rooms.signal(self.now, session, message);
        self.settle();
    }

    pub(crate) fn answer(&mut self, session: SessionId) {
        let answer = livekit_protocol::SessionDescription {
            r#type: "answer".into(),
            sdp: "answer".into(),
            ..Default::default()
        };
        self.up(session, Up::Answer(answer));
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.rooms.plane(self.now, event);
        self.settle();
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        let step = Duration::from_millis(200);
        let end = self.now.instant + time;
        while self.now.instant < end {
            self.now.instant += step;
            self.now.unix += step;
            self.rooms.tick(self.now);
            self.settle();
        }
    }

    /// What a session was sent since the last time.
    pub(crate) fn take(&mut self, session: SessionId) -> Vec<Down> {
        self.sent.remove(&session).unwrap_or_default()
    }

    pub(crate) fn settle(&mut self) {
        loop {
            while let Some(output) = self.rooms.poll() {
                match output {
                    Output::Send { session, message } => {
                        assert!(!self.closed.contains(&session), "sent after close: {message:?}");
                        self.sent.entry(session).or_default().push(*message);
                    }
                    Output::Close { session } => self.closed.push(session),
                    Output::Plane(command @ Command::SendData { .. }) => self.data.push(command),
                    Output::Plane(command) => self.events.extend(self.plane.handle(command)),
                    Output::Presence(presence) => self.presence.push(presence),
                    other => panic!("an output that the tests do not know: {other:?}"),
                }
            }
            let Some(event) = self.events.pop_front() else { return };
            self.rooms.plane(self.now, event);
        }
    }
}
