//! A focus in a process of its own, which can be killed.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use antiphon_focus::{Config, Focus};
use antiphon_testkit::peers::ports;
use tokio::{net::TcpStream, process::Child};

use crate::support::until;

const LIMIT: Duration = Duration::from_secs(60);
const FOCUS: &str = "ANTIPHON_TEST_FOCUS";

/// The process of a [`FocusProcess`].
#[tokio::test(flavor = "multi_thread")]
#[ignore = "only the process of a focus"]
async fn focus_process() {
    let Ok(addresses) = std::env::var(FOCUS) else { return };
    let mut addresses = addresses.split(' ').map(|address| address.parse().unwrap());
    let mut config = Config::dev();
    // As in a deployment: the authorisation service makes the rooms.
    config.auto_create = false;
    config.http_bind = addresses.next().unwrap();
    config.udp_bind = addresses.next().unwrap();
    config.advertised = addresses.collect();
    let _focus = Focus::start(config).await.unwrap();
    std::future::pending::<()>().await;
}

/// A focus in a process of its own, which can be killed, and started again on the same ports.
pub(crate) struct FocusProcess {
    pub(crate) http: SocketAddr,
    udp: SocketAddr,
    advertised: SocketAddr,
    child: Child,
}

impl FocusProcess {
    pub(crate) async fn start(udp: SocketAddr, advertised: SocketAddr) -> Self {
        let http = SocketAddr::from(([127, 0, 0, 1], ports::free().unwrap()));
        let mut focus = Self { http, udp, advertised, child: Self::spawn(http, udp, advertised) };
        focus.ready().await;
        focus
    }

    fn spawn(http: SocketAddr, udp: SocketAddr, advertised: SocketAddr) -> Child {
        tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "focus_process::focus_process", "--ignored", "--nocapture"])
            .env(FOCUS, format!("{http} {udp} {advertised}"))
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    async fn ready(&mut self) {
        until("focus up", LIMIT, async || TcpStream::connect(self.http).await.is_ok()).await;
    }

    /// Ends the process at once, so that nobody is told.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    pub(crate) async fn restart(&mut self) {
        self.child = Self::spawn(self.http, self.udp, self.advertised);
        self.ready().await;
    }
}
