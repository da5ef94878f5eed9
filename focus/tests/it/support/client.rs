//! A raw signalling client over a real WebSocket, and a focus with a scripted plane.
#![allow(
    clippy::disallowed_methods,
    reason = "this is the tests' shell: it starts the scripted plane's task"
)]

use std::time::Duration;

use antiphon_focus::plane::{Command, Event};
use antiphon_focus::{Config, Focus, FocusHandle};
use futures_util::{SinkExt as _, StreamExt as _};
use livekit_protocol::{self as proto, signal_request::Message as Up, signal_response::Message as Down};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::plane::ScriptedPlane;

/// Longest wait for anything that must come.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A focus on loopback whose media plane is scripted.
pub(crate) async fn focus(change: impl FnOnce(&mut Config)) -> FocusHandle {
    let mut config = Config::dev_ephemeral();
    change(&mut config);
    let (commands, mut queue) = mpsc::channel::<Command>(64);
    let (events, receiver) = mpsc::channel::<Event>(64);
    tokio::spawn(async move {
        let mut plane = ScriptedPlane::default();
        while let Some(command) = queue.recv().await {
            for event in plane.handle(command) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
    });
    Focus::start_with_plane(config, commands, receiver).await.unwrap()
}

pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Client {
    /// Connects as livekit-client does.
    pub(crate) async fn connect(focus: &FocusHandle, token: &str) -> Result<Self, tungstenite::Error> {
        Self::connect_to(&format!("{}/rtc?access_token={token}&protocol=17&sdk=js", focus.ws_url())).await
    }

    pub(crate) async fn connect_to(url: &str) -> Result<Self, tungstenite::Error> {
        let connected = tokio::time::timeout(DEADLINE, tokio_tungstenite::connect_async(url));
        let (socket, _) = connected.await.expect("no answer to the upgrade")?;
        Ok(Self { socket })
    }

    pub(crate) async fn join(focus: &FocusHandle, identity: &str) -> (Self, proto::JoinResponse) {
        let mut client = Self::connect(focus, &super::token(identity, |_| {})).await.unwrap();
        let Down::Join(join) = client.next().await else { panic!("the first message is not a JoinResponse") };
        (client, join)
    }

    pub(crate) async fn send(&mut self, message: Up) {
        let bytes = proto::SignalRequest { message: Some(message) }.encode_to_vec();
        self.socket.send(Message::Binary(bytes.into())).await.unwrap();
    }

    /// The next signalling message.
    pub(crate) async fn next(&mut self) -> Down {
        loop {
            match self.frame().await {
                Some(Message::Binary(bytes)) => {
                    return proto::SignalResponse::decode(bytes).unwrap().message.unwrap();
                }
                Some(Message::Ping(_) | Message::Pong(_)) => {}
                other => panic!("expected a message, got {other:?}"),
            }
        }
    }

    /// The next message that `wanted` takes; others are passed over.
    pub(crate) async fn expect<T>(&mut self, mut wanted: impl FnMut(Down) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next().await) {
                return found;
            }
        }
    }

    /// The code and the reason that the connection is closed with; messages before are passed over.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.frame().await {
                Some(Message::Close(Some(frame))) => return (frame.code.into(), frame.reason.to_string()),
                Some(Message::Close(None)) | None => return (1005, String::new()),
                Some(_) => {}
            }
        }
    }

    pub(crate) async fn frame(&mut self) -> Option<Message> {
        let next = tokio::time::timeout(DEADLINE, self.socket.next()).await;
        next.expect("nothing came").and_then(Result::ok)
    }
}

/// The status and the body of a refused upgrade.
pub(crate) fn refusal(result: Result<Client, tungstenite::Error>) -> (u16, String) {
    match result {
        Err(tungstenite::Error::Http(response)) => {
            let body = response.body().clone().unwrap_or_default();
            (response.status().as_u16(), String::from_utf8_lossy(&body).into_owned())
        }
        Err(error) => panic!("not an HTTP answer: {error}"),
        Ok(_) => panic!("the upgrade was not refused"),
    }
}
