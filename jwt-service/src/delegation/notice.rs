//! What replicas that share a store tell each other: webhooks that reached one which does not have the job's
//! lease, and who takes a job over from whom. Nothing rests on a notice being heard; it only saves time.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Input, JobKey, Leave};
use crate::identity::{ParticipantIdentity, RoomAlias};

/// The longest notice that is read, in bytes: an identity comes from a request body of at most 64 KiB, and JSON
/// can write a byte as six.
const MAX_LEN: usize = 512 * 1024;

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
    /// A replica stops, and all its leases are free: this job's and others'.
    Stopped,
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

impl Notice {
    /// The notice as a message of the process `from`.
    pub(super) fn encode(&self, from: u64) -> Vec<u8> {
        let news = match self.news.clone() {
            News::Joined { sid } => Written::Joined { sid },
            News::Left { sid, why } => Written::Left { sid, why: why_number(why) },
            News::Replaced { made } => {
                let since = made.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                Written::Replaced { made_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX) }
            }
            News::Released { sid } => Written::Released { sid },
            News::Stopped => Written::Stopped,
        };
        let (room, identity) = (self.key.room.as_str().to_owned(), self.key.identity.as_str().to_owned());
        // Serialising strings and integers into memory has no way to fail.
        serde_json::to_vec(&Message { from, room, identity, news }).unwrap_or_default()
    }

    /// The notice in a message of another process than `own`; `None` if it is no notice, or our own.
    pub(super) fn decode(message: &[u8], own: u64) -> Option<Self> {
        if message.len() > MAX_LEN {
            return None;
        }
        let Message { from, room, identity, news } = serde_json::from_slice(message).ok()?;
        if from == own || room.is_empty() || identity.is_empty() {
            return None;
        }
        let key =
            JobKey { room: RoomAlias::from_sfu(room), identity: ParticipantIdentity::from_sfu(identity) };
        let news = match news {
            Written::Joined { sid } => News::Joined { sid },
            Written::Left { sid, why } => News::Left { sid, why: why_from(why) },
            Written::Replaced { made_ms } => {
                News::Replaced { made: SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(made_ms))? }
            }
            Written::Released { sid } => News::Released { sid },
            Written::Stopped => News::Stopped,
        };
        Some(Self { key, news })
    }
}

#[derive(Deserialize, Serialize)]
struct Message {
    /// Which process says it.
    from: u64,
    room: String,
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
    Stopped,
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

    fn notice(news: News) -> Notice {
        let room = RoomAlias::of_slot("!r:hs", "s");
        Notice { key: JobKey { room, identity: ParticipantIdentity::from_sfu("@a:hs:<D>") }, news }
    }

    #[test]
    fn what_is_told_is_heard_by_others_alone() {
        let sid = || Some("PA_1".to_owned());
        for news in [
            News::Joined { sid: sid() },
            News::Joined { sid: None },
            News::Left { sid: sid(), why: Leave::OnPurpose },
            News::Left { sid: None, why: Leave::TakenOver },
            News::Left { sid: None, why: Leave::Otherwise },
            News::Replaced { made: SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_847_300_123) },
            News::Released { sid: sid() },
        ] {
            let told = notice(news);
            assert_eq!(Notice::decode(&told.encode(1), 2), Some(told.clone()));
            assert_eq!(Notice::decode(&told.encode(1), 1), None);
        }
    }

    #[test]
    fn what_is_no_notice_is_passed_over() {
        for text in
            ["", "{}", "hello", r#"{"from":1,"room":"","identity":"i","news":{"joined":{"sid":null}}}"#]
        {
            assert_eq!(Notice::decode(text.as_bytes(), 2), None, "{text}");
        }
        let long = notice(News::Joined { sid: Some("x".repeat(MAX_LEN)) });
        assert_eq!(Notice::decode(&long.encode(1), 2), None);
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), ms in any::<u64>()) {
            let _ = Notice::decode(&bytes, 1);
            let text = format!(r#"{{"from":1,"room":"r","identity":"i","news":{{"replaced":{{"made_ms":{ms}}}}}}}"#);
            let _ = Notice::decode(text.as_bytes(), 2);
        }
    }
}
