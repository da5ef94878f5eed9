//! The admin API: LiveKit's RoomService over Twirp.

mod twirp;

pub(crate) use twirp::router;
