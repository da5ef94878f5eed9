//! Identifiers and the machine's notion of time.

use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc, time::Duration};

use serde::{Serialize, Serializer};

macro_rules! identifier {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) struct $name(Arc<str>);

        impl $name {
            pub(super) fn new(text: impl AsRef<str>) -> Self {
                Self(text.as_ref().into())
            }
        }

        impl Deref for $name {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    )*};
}

identifier! {
    /// `@localpart:server`.
    UserId
    /// Opaque, chosen by the client or by the server.
    DeviceId
    /// `!opaque` (room version 12) or `!opaque:server`.
    RoomId
    /// `$opaque`.
    EventId
    /// `syd_opaque`.
    DelayId
}

/// Milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Timestamp(pub(super) u64);

impl Timestamp {
    pub(super) fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay.as_millis() as u64))
    }

    /// How long until `later`; zero when it has passed.
    pub(super) fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0))
    }
}

/// A place in the server's one stream of changes; every change takes the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pos(pub(super) u64);

/// Who makes a request: a user on one of their devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) user: UserId,
    pub(super) device: DeviceId,
}
