//! One WebSocket: protobuf in, protobuf out.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, close_code};
use livekit_protocol::{self as proto, DisconnectReason, leave_request::Action, signal_response};
use prost::Message as _;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::tungstenite;

use super::manager::{Ending, Joined, Out, RoomHandle};
use crate::room::leave;

/// Largest message, in bytes.
pub(super) const MAX_MESSAGE: usize = 2 * 1024 * 1024;
/// How often the client is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A client that gave none for this long is gone.
const SILENT_FOR: Duration = Duration::from_secs(35);
/// A client must take a message within this time.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// Serves a session until either side ends it.
pub(super) async fn serve(mut socket: WebSocket, joined: Joined, rooms: RoomHandle) {
    let Joined { session, mut out, mut guard } = joined;
    let mut ping = interval(PING_EVERY);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ping.reset();
    let mut heard = Instant::now();
    let ended = loop {
        tokio::select! {
            next = out.recv() => match next {
                Some(Out::Message(message)) => {
                    if write(&mut socket, encode(*message)).await.is_err() {
                        break None;
                    }
                }
                Some(Out::Close) => break Some((close_code::NORMAL, "")),
                None => break Some((close_code::POLICY, "messages were not read fast enough")),
            },
            read = socket.recv() => {
                heard = Instant::now();
                match read {
                    Some(Ok(Message::Binary(bytes))) => match proto::SignalRequest::decode(bytes) {
                        // A message that we do not know is a newer client's.
                        Ok(proto::SignalRequest { message: None }) => {}
                        Ok(proto::SignalRequest { message: Some(message) }) => {
                            if rooms.signal(session, message).await.is_err() {
                                break Some((close_code::AWAY, "the server is shutting down"));
                            }
                        }
                        Err(_) => {
                            guard.ending = Ending::Protocol;
                            break Some((close_code::INVALID, "the message is not a protobuf SignalRequest"));
                        }
                    },
                    Some(Ok(Message::Text(_))) => {
                        guard.ending = Ending::Protocol;
                        break Some((close_code::UNSUPPORTED, "JSON signalling is not supported: send protobuf"));
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(Message::Close(_))) | None => break None,
                    Some(Err(error)) => {
                        if too_long(&error) {
                            guard.ending = Ending::Protocol;
                            break Some((close_code::SIZE, "the message is larger than 2 MiB"));
                        }
                        break None;
                    }
                }
            },
            _ = ping.tick() => {
                if heard.elapsed() > SILENT_FOR {
                    break None;
                }
                if write(&mut socket, Message::Ping(axum::body::Bytes::new())).await.is_err() {
                    break None;
                }
            }
        }
    };
    // The room learns of the end now; the rest is manners.
    drop(guard);
    drop(out);
    finish(socket, ended).await;
}

/// Tells a client that tries to resume to join anew.
pub(super) async fn refuse_resume(mut socket: WebSocket) {
    let message = leave(DisconnectReason::StateMismatch, Action::Reconnect);
    if write(&mut socket, encode(message)).await.is_ok() {
        finish(socket, Some((close_code::NORMAL, ""))).await;
    }
}

/// Says why, and gives the client a moment to read it: a socket closed at once would be reset, and what was sent
/// last would be lost with it.
async fn finish(mut socket: WebSocket, ended: Option<(u16, &'static str)>) {
    if let Some((code, reason)) = ended {
        let close = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
        if write(&mut socket, close).await.is_ok() {
            let rest = async { while let Some(Ok(_)) = socket.recv().await {} };
            let _ = timeout(Duration::from_secs(2), rest).await;
        }
    }
}

async fn write(socket: &mut WebSocket, message: Message) -> Result<(), ()> {
    match timeout(WRITE_WITHIN, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(()),
    }
}

fn encode(message: signal_response::Message) -> Message {
    Message::Binary(proto::SignalResponse { message: Some(message) }.encode_to_vec().into())
}

fn too_long(error: &axum::Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<tungstenite::Error>())
        .is_some_and(|error| matches!(error, tungstenite::Error::Capacity(_)))
}
