//! A redacted account of a call, made for pasting into a bug report.
//!
//! It names no user, device, room or key: members are numbered, and only their server names are kept. Times count from
//! the beginning of the call.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::stats::TrackStats;
use crate::{
    member::{Device, MemberKey},
    transport::{ConnectStage, ConnectionId, LiveKitFocus},
};

/// Entries that are kept; the oldest half of a longer call is dropped, and counted.
const MAX_ENTRIES: usize = 2048;
/// Most members that get a number of their own.
const MAX_NUMBERS: usize = 16_384;

/// A step of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Step {
    /// The room was read.
    RoomRead {
        /// Whether it is encrypted.
        encrypted: bool,
        /// Members of our slot, ourselves included.
        members: usize,
    },
    /// Discovery ended.
    Discovered {
        /// Usable foci.
        foci: usize,
    },
    /// A token was got.
    Token {
        /// Which connection.
        connection: String,
    },
    /// A connection made progress.
    Connection {
        /// Which.
        connection: String,
        /// Focus, by host name; `mesh` for a mesh peer.
        focus: String,
        /// How far.
        stage: &'static str,
    },
    /// A connection failed or ended.
    ConnectionFailed {
        /// Which focus, by host name.
        focus: String,
        /// Why.
        reason: String,
    },
    /// Our media moved.
    Moved {
        /// `focus` or `mesh`.
        to: &'static str,
    },
    /// Media can travel directly between us and a member.
    PairConnected {
        /// Its number.
        member: usize,
    },
    /// An attempt to connect directly failed.
    PairFailed {
        /// The member's number.
        member: usize,
        /// Why.
        reason: String,
    },
    /// Our membership was published.
    MembershipPublished,
    /// Our membership was in trouble.
    MembershipTrouble {
        /// Why.
        reason: String,
    },
    /// A member came.
    MemberJoined {
        /// Its number.
        member: usize,
        /// Its form.
        form: &'static str,
    },
    /// A member left.
    MemberLeft {
        /// Its number.
        member: usize,
    },
    /// A member's key was installed.
    KeyReceived {
        /// Its number.
        member: usize,
        /// At which index.
        index: u8,
    },
    /// A key was refused.
    KeyRejected {
        /// Why.
        reason: String,
    },
    /// Every member has our key.
    OwnKeyDelivered {
        /// Its index.
        index: u8,
    },
    /// Our key did not reach a device.
    KeyNotSent {
        /// The member's number.
        member: usize,
        /// Why.
        reason: String,
    },
    /// We seal with another key.
    OwnKeyInUse {
        /// Its index.
        index: u8,
    },
    /// A track began.
    Track {
        /// The member's number.
        member: usize,
        /// What it is.
        source: String,
    },
    /// The call ended.
    Ended {
        /// Why.
        reason: String,
    },
}

/// A step and its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Milliseconds since the beginning of the call.
    pub at_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub step: Step,
}

/// A member as the report shows it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct MemberReport {
    /// Its number.
    pub member: usize,
    /// Its server.
    pub server: String,
    /// Its tracks.
    pub tracks: Vec<TrackReport>,
}

/// A track as the report shows it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct TrackReport {
    /// Name on its connection.
    pub sid: String,
    /// What it is.
    pub source: String,
    /// Codec, once known.
    pub codec: Option<String>,
    /// Whether it is muted.
    pub muted: bool,
    /// What came in.
    #[serde(flatten)]
    pub stats: TrackStats,
}

/// An account of a call. Its JSON names no user, device, room or key.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CallReport {
    /// Version of this crate.
    pub version: &'static str,
    /// Whether the call is encrypted.
    pub encrypted: bool,
    /// The membership form that we write.
    pub mode: String,
    /// Milliseconds since the beginning of the call.
    pub at_ms: u64,
    /// The members that are present.
    pub members: Vec<MemberReport>,
    /// The steps, oldest first.
    pub timeline: Vec<Entry>,
    /// Steps that were dropped because the call is long.
    pub dropped_steps: u64,
}

impl CallReport {
    /// The report as JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        // The types above hold nothing that JSON cannot express.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// When a step happened for the first time, from the beginning of the call.
    #[must_use]
    pub fn first(&self, is: impl Fn(&Step) -> bool) -> Option<Duration> {
        self.timeline.iter().find(|entry| is(&entry.step)).map(|entry| Duration::from_millis(entry.at_ms))
    }
}

/// Collects the steps of a call.
#[derive(Debug)]
pub(crate) struct Timeline {
    begin: Instant,
    entries: VecDeque<Entry>,
    dropped: u64,
    numbers: BTreeMap<MemberKey, usize>,
}

impl Timeline {
    pub(crate) fn new(begin: Instant) -> Self {
        Self { begin, entries: VecDeque::new(), dropped: 0, numbers: BTreeMap::new() }
    }

    pub(crate) fn begin(&self) -> Instant {
        self.begin
    }

    pub(crate) fn add(&mut self, now: Instant, step: Step) {
        if self.entries.len() == MAX_ENTRIES {
            self.entries.drain(..MAX_ENTRIES / 2);
            self.dropped += u64::try_from(MAX_ENTRIES / 2).unwrap_or_default();
        }
        self.entries.push_back(Entry { at_ms: self.at_ms(now), step });
    }

    /// The number that stands for a member; 0 once there were very many.
    pub(crate) fn number(&mut self, member: &MemberKey) -> usize {
        if self.numbers.len() >= MAX_NUMBERS && !self.numbers.contains_key(member) {
            return 0;
        }
        let next = self.numbers.len() + 1;
        *self.numbers.entry(member.clone()).or_insert(next)
    }

    /// The number of a member by its device; 0 if it was never a member.
    pub(crate) fn number_of_device(&self, device: &Device) -> usize {
        let is = |key: &MemberKey| {
            key.user_id == device.user_id && key.device_id.as_ref() == Some(&device.device_id)
        };
        self.numbers.iter().find(|(key, _)| is(key)).map_or(0, |(_, number)| *number)
    }

    pub(crate) fn at_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.begin).as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.entries.iter().cloned().collect()
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }
}

/// The name of an enum's variant, without what is in it: texts of servers may name users and rooms.
pub(crate) fn variant(value: &dyn std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// A focus by its host name: paths and queries may hold secrets of a deployment.
pub(crate) fn host(focus: &LiveKitFocus) -> String {
    let text = focus.to_string();
    text.split("://").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or("?").to_owned()
}

/// `focus` is `None` for the connection to a mesh peer.
pub(crate) fn stage(connection: ConnectionId, focus: Option<&LiveKitFocus>, stage: ConnectStage) -> Step {
    let stage = match stage {
        ConnectStage::Signalled => "signalled",
        ConnectStage::IceConnected => "ice_connected",
        ConnectStage::MediaUp => "media_up",
    };
    let focus = focus.map_or_else(|| "mesh".to_owned(), host);
    Step::Connection { connection: connection.to_string(), focus, stage }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test needs some point in time to start from")]
mod tests {
    use super::*;
    use crate::machine::testing;

    #[test]
    fn long_calls_keep_the_newer_half() {
        let begin = Instant::now();
        let mut timeline = Timeline::new(begin);
        for _ in 0..=MAX_ENTRIES {
            timeline.add(begin, Step::MembershipPublished);
        }
        assert_eq!((timeline.entries().len(), timeline.dropped()), (MAX_ENTRIES / 2 + 1, 1024));
    }

    #[test]
    fn report_names_no_user_and_no_path() {
        let mut timeline = Timeline::new(Instant::now());
        let alice = testing::state_member("@alice:example.org", "ALICEDEV", 0);
        let number = timeline.number(&alice.key());
        assert_eq!(timeline.number(&alice.key()), number);
        let focus = testing::focus("https://jwt.example/secret-path");
        timeline.add(timeline.begin(), Step::MemberJoined { member: number, form: "state" });
        timeline.add(
            timeline.begin(),
            stage(ConnectionId { route: 0, generation: 1 }, Some(&focus), ConnectStage::MediaUp),
        );
        let json = serde_json::to_string(&timeline.entries()).unwrap();
        assert!(json.contains("jwt.example") && json.contains("media_up"), "{json}");
        assert!(
            !json.contains("alice") && !json.contains("ALICEDEV") && !json.contains("secret-path"),
            "{json}"
        );
    }
}
