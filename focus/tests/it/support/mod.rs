//! What the tests share: a focus over a scripted media plane, a raw signalling client, and rooms driven by hand.

pub(crate) mod client;
pub(crate) mod machine;
pub(crate) mod plane;

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use antiphon_focus::token::{Claims, Keys, Secret, VideoGrant};

pub(crate) const ROOM: &str = "room";

pub(crate) fn keys() -> Keys {
    Keys::new().with("devkey", Secret::new("secret"))
}

/// Claims that let `identity` join [`ROOM`]; `change` may change them. Valid for an hour from the system's time.
#[allow(clippy::disallowed_methods, reason = "a token for a running server needs the time")]
pub(crate) fn claims(identity: &str, change: impl FnOnce(&mut Claims)) -> Claims {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let mut claims = Claims::default();
    claims.sub = identity.into();
    claims.exp = Some((now + Duration::from_secs(3600)).as_secs());
    claims.video = grant(|grant| {
        grant.room = ROOM.into();
        grant.room_join = true;
        grant.can_update_own_metadata = Some(true);
    });
    claims.attributes = HashMap::new();
    change(&mut claims);
    claims
}

pub(crate) fn grant(change: impl FnOnce(&mut VideoGrant)) -> VideoGrant {
    let mut grant = VideoGrant::default();
    change(&mut grant);
    grant
}

pub(crate) fn token(identity: &str, change: impl FnOnce(&mut Claims)) -> String {
    keys().sign(&claims(identity, change)).unwrap()
}
