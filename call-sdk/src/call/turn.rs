//! The homeserver's TURN servers, kept until shortly before their credentials run out.
//!
//! A connection keeps the credentials that it began with: a TURN server refuses any other user name for an allocation
//! that exists (RFC 8656 §5), and coturn looks at the time of the credentials only when an allocation is made.
#![allow(clippy::disallowed_methods, reason = "this is part of the shell: it owns the clock")]

use std::time::Duration;

use tokio::{sync::Mutex, time::Instant};

use crate::{
    matrix::{MatrixPort, MatrixReply, MatrixRequest, TurnServers},
    transport::livekit::IceServer,
};

/// How long the homeserver may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long before credentials run out others are asked for; a quarter of their time if that is less.
const MARGIN: Duration = Duration::from_secs(120);
/// How long a homeserver that did not answer is left alone.
const RETRY: Duration = Duration::from_secs(10);
/// How long a homeserver without TURN servers is left alone.
const NONE_FOR: Duration = Duration::from_secs(600);

/// Longer times are taken for this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The STUN and TURN servers for the connections of one call.
#[derive(Debug)]
pub(super) struct Turn {
    /// Those that don't depend on the homeserver.
    fixed: Vec<IceServer>,
    known: Mutex<Known>,
}

/// What the homeserver told.
#[derive(Debug, Default)]
struct Known {
    servers: Option<(IceServer, Instant)>,
    /// When it is asked again; `None`: it was not asked yet.
    ask_at: Option<Instant>,
}

impl Turn {
    pub(super) fn new(fixed: Vec<IceServer>) -> Self {
        Self { fixed, known: Mutex::default() }
    }

    /// The servers for a new connection.
    pub(super) async fn servers(&self, port: &dyn MatrixPort) -> Vec<IceServer> {
        // Connections that are opened together wait here for one answer.
        let mut known = self.known.lock().await;
        if known.ask_at.is_none_or(|at| at <= Instant::now()) {
            let reply = port.perform(MatrixRequest::TurnServers, TIMEOUT).await;
            match reply {
                Ok(MatrixReply::Turn(turn)) => *known = Known::told(Instant::now(), &turn),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "the homeserver does not tell its TURN servers");
                    known.ask_at = Some(Instant::now() + RETRY);
                }
            }
        }
        let told = known.servers.iter().filter(|(_, expires)| *expires > Instant::now());
        self.fixed.iter().chain(told.map(|(server, _)| server)).cloned().collect()
    }
}

impl Known {
    fn told(now: Instant, turn: &TurnServers) -> Self {
        if turn.uris.is_empty() {
            return Self { servers: None, ask_at: Some(now + NONE_FOR) };
        }
        let server = IceServer {
            urls: turn.uris.clone(),
            username: turn.username.clone(),
            credential: turn.password.clone(),
        };
        // Without a time, they are taken for as long as an answer without servers.
        let ttl = if turn.ttl.is_zero() { NONE_FOR } else { turn.ttl.min(LONGEST) };
        let usable = ttl.saturating_sub(MARGIN.min(ttl / 4));
        Self { servers: Some((server, now + ttl)), ask_at: Some(now + usable) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use async_trait::async_trait;
    use ruma_common::{RoomId, room_id};
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        machine::testing,
        matrix::{
            Delivery, MatrixError, MatrixUpdate, OwnTrust, RequestError, RoomView, ToDeviceBatch, TrustPolicy,
        },
        member::Device,
    };

    const TTL: Duration = Duration::from_secs(3600);

    /// A homeserver that tells other credentials every time, unless it is down.
    #[derive(Debug)]
    struct Homeserver {
        device: Device,
        asked: AtomicU64,
        down: AtomicBool,
        ttl: Duration,
    }

    impl Homeserver {
        fn new(ttl: Duration) -> Self {
            let device = testing::device("@me:own.example", "DEV");
            Self { device, asked: AtomicU64::new(0), down: false.into(), ttl }
        }

        fn asked(&self) -> u64 {
            self.asked.load(Ordering::Relaxed)
        }
    }

    #[async_trait]
    impl MatrixPort for Homeserver {
        fn device(&self) -> &Device {
            &self.device
        }

        fn room_id(&self) -> &RoomId {
            room_id!("!room:own.example")
        }

        fn trust(&self) -> TrustPolicy {
            TrustPolicy::default()
        }

        async fn own_trust(&self) -> Result<OwnTrust, MatrixError> {
            Ok(OwnTrust::CrossSigned)
        }

        async fn room_view(&self) -> Result<RoomView, MatrixError> {
            Ok(RoomView::default())
        }

        async fn perform(&self, request: MatrixRequest, _: Duration) -> Result<MatrixReply, RequestError> {
            assert_eq!(request, MatrixRequest::TurnServers);
            let number = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
            if self.down.load(Ordering::Relaxed) {
                return Err(RequestError::TimedOut);
            }
            let uris = if self.ttl.is_zero() { Vec::new() } else { vec!["turn:turn.example".to_owned()] };
            Ok(MatrixReply::Turn(TurnServers {
                uris,
                username: number.to_string(),
                password: "secret".to_owned(),
                ttl: self.ttl,
            }))
        }

        async fn send_to_device(&self, _: ToDeviceBatch, _: mpsc::Sender<(Device, Delivery)>) {}

        async fn updates(&self) -> mpsc::Receiver<MatrixUpdate> {
            mpsc::channel(1).1
        }
    }

    async fn username(turn: &Turn, homeserver: &Homeserver) -> Option<String> {
        turn.servers(homeserver).await.last().map(|server| server.username.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn connections_share_one_answer_until_shortly_before_it_expires() {
        let (turn, homeserver) = (Turn::new(Vec::new()), Homeserver::new(TTL));
        let users = tokio::join!(username(&turn, &homeserver), username(&turn, &homeserver));
        assert_eq!(users, (Some("1".to_owned()), Some("1".to_owned())));
        tokio::time::sleep(TTL - MARGIN - Duration::from_secs(1)).await;
        assert_eq!(username(&turn, &homeserver).await, Some("1".to_owned()));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(username(&turn, &homeserver).await, Some("2".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn answer_is_used_until_it_expires_while_the_homeserver_is_down() {
        let (turn, homeserver) = (Turn::new(Vec::new()), Homeserver::new(TTL));
        username(&turn, &homeserver).await;
        homeserver.down.store(true, Ordering::Relaxed);
        tokio::time::sleep(TTL - MARGIN).await;
        for _ in 0..3 {
            assert_eq!(username(&turn, &homeserver).await, Some("1".to_owned()));
        }
        assert_eq!(homeserver.asked(), 2);
        tokio::time::sleep(MARGIN).await;
        assert_eq!(username(&turn, &homeserver).await, None);
        homeserver.down.store(false, Ordering::Relaxed);
        tokio::time::sleep(RETRY).await;
        assert_eq!(username(&turn, &homeserver).await, Some("4".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn homeserver_without_servers_is_left_alone_for_a_while() {
        let fixed = IceServer { urls: Vec::new(), username: "fixed".to_owned(), credential: String::new() };
        let (turn, homeserver) = (Turn::new(vec![fixed]), Homeserver::new(Duration::ZERO));
        for _ in 0..3 {
            assert_eq!(username(&turn, &homeserver).await, Some("fixed".to_owned()));
        }
        assert_eq!(homeserver.asked(), 1);
    }
}
