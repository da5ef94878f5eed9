//! What replicas that share a store tell each other: webhooks that reached one which does not have the job's
//! lease, who takes a job over from whom, and who is there at all. Nothing rests on its being heard; it only saves
//! time.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Input, JobKey, Leave};
use crate::identity::{ParticipantIdentity, RoomAlias};

/// The longest notice that is read, in bytes: an identity comes from a request body of at most 64 KiB, and JSON
/// can write a byte as six.
const MAX_LEN: usize = 512 * 1024;

/// What one process tells all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Something about one participant's job.
    Notice(Notice),
    /// This replica is running.
    Here {
        /// Its name.
        replica: String,
    },
    /// This replica stops, and all its leases are free.
    Stopped,
}

/// Something about one participant's job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    pub(crate) key: JobKey,
    pub(crate) news: News,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The SFU said that the participant has joined.
    Joined { sid: Option<String> },
    /// The SFU said that the participant's connection has ended.
    Left { sid: Option<String>, why: Leave },
    /// A client has delegated a new leave at another replica, at this time.
    Replaced { made: SystemTime },
    /// The lease is free for whoever has replaced the job. Its participant was there by this connection.
    Released { sid: Option<String> },
}

impl News {
    /// What others need to know of `input`: what the SFU says, and nothing that was asked for.
    pub(super) fn of(input: &Input) -> Option<Self> {
        match input {
            Input::Joined { sid } => Some(Self::Joined { sid: sid.clone() }),
            Input::Left { sid, why } => Some(Self::Left { sid: sid.clone(), why: *why }),
            Input::Looked { .. } | Input::Called { .. } => None,
        }
    }
}

impl Told {
    /// This as a message of the process `from`.
    pub(super) fn encode(&self, from: u64) -> Vec<u8> {
        let (key, news) = match self.clone() {
            Self::Notice(Notice { key, news }) => (Some(key), Written::of(news)),
            Self::Here { replica } => (None, Written::Here { replica }),
            Self::Stopped => (None, Written::Stopped),
        };
        let (room, identity) = key
            .map(|key| (key.room.as_str().to_owned(), key.identity.as_str().to_owned()))
            .unwrap_or_default();
        // Serialising strings and integers into memory has no way to fail.
        serde_json::to_vec(&Message { from, room, identity, news }).unwrap_or_default()
    }

    /// What a message of another process than `own` says; `None` if it is none that we know, or our own.
    pub(super) fn decode(message: &[u8], own: u64) -> Option<Self> {
        if message.len() > MAX_LEN {
            return None;
        }
        let Message { from, room, identity, news } = serde_json::from_slice(message).ok()?;
        if from == own {
            return None;
        }
        let news = match news {
            Written::Here { replica } => return Some(Self::Here { replica }),
            Written::Stopped => return Some(Self::Stopped),
            Written::Joined { sid } => News::Joined { sid },
            Written::Left { sid, why } => News::Left { sid, why: why_from(why) },
            Written::Replaced { made_ms } => {
                News::Replaced { made: SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(made_ms))? }
            }
            Written::Released { sid } => News::Released { sid },
        };
        if room.is_empty() || identity.is_empty() {
            return None;
        }
        let key =
            JobKey { room: RoomAlias::from_sfu(room), identity: ParticipantIdentity::from_sfu(identity) };
        Some(Self::Notice(Notice { key, news }))
    }
}

#[derive(Deserialize, Serialize)]
struct Message {
    /// Which process says it.
    from: u64,
    /// Both are empty if it is about no participant.
    #[serde(default)]
    room: String,
    #[serde(default)]
    identity: String,
    news: Written,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Written {
    Joined { sid: Option<String> },
    Left { sid: Option<String>, why: u8 },
    Replaced { made_ms: u64 },
    Released { sid: Option<String> },
    Here { replica: String },
    Stopped,
}

impl Written {
    fn of(news: News) -> Self {
        match news {
            News::Joined { sid } => Self::Joined { sid },
            News::Left { sid, why } => Self::Left { sid, why: why_number(why) },
            News::Replaced { made } => {
                let since = made.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                Self::Replaced { made_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX) }
            }
            News::Released { sid } => Self::Released { sid },
        }
    }
}

/// LiveKit's numbers, as far as they matter; 0 is anything else.
fn why_number(why: Leave) -> u8 {
    match why {
        Leave::OnPurpose => 1,
        Leave::TakenOver => 2,
        Leave::Otherwise => 0,
    }
}

fn why_from(number: u8) -> Leave {
    match number {
        1 => Leave::OnPurpose,
        2 => Leave::TakenOver,
        _ => Leave::Otherwise,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn notice(news: News) -> Told {
        let room = RoomAlias::of_slot("!r:hs", "s");
        Told::Notice(Notice {
            key: JobKey { room, identity: ParticipantIdentity::from_sfu("@a:hs:<D>") },
            news,
        })
    }

    #[test]
    fn what_is_told_is_heard_by_others_alone() {
        let sid = || Some("PA_1".to_owned());
        for told in [
            notice(News::Joined { sid: sid() }),
            notice(News::Joined { sid: None }),
            notice(News::Left { sid: sid(), why: Leave::OnPurpose }),
            notice(News::Left { sid: None, why: Leave::TakenOver }),
            notice(News::Left { sid: None, why: Leave::Otherwise }),
            notice(News::Replaced {
                made: SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_847_300_123),
            }),
            notice(News::Released { sid: sid() }),
            Told::Here { replica: "one".to_owned() },
            Told::Stopped,
        ] {
            assert_eq!(Told::decode(&told.encode(1), 2), Some(told.clone()));
            assert_eq!(Told::decode(&told.encode(1), 1), None);
        }
    }

    #[test]
    fn what_is_no_notice_is_passed_over() {
        for text in
            ["", "{}", "hello", r#"{"from":1,"room":"","identity":"i","news":{"joined":{"sid":null}}}"#]
        {
            assert_eq!(Told::decode(text.as_bytes(), 2), None, "{text}");
        }
        let long = notice(News::Joined { sid: Some("x".repeat(MAX_LEN)) });
        assert_eq!(Told::decode(&long.encode(1), 2), None);
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), ms in any::<u64>()) {
            let _ = Told::decode(&bytes, 1);
            let text = format!(r#"{{"from":1,"room":"r","identity":"i","news":{{"replaced":{{"made_ms":{ms}}}}}}}"#);
            let _ = Told::decode(text.as_bytes(), 2);
        }
    }
}
