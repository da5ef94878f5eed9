//! The program under test: its own process, so that what it uses is read from `/proc` and nothing else is in it.

use std::{
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::oneshot;

use crate::fakes::Fakes;

pub(crate) const KEY: &str = "bench-key";
pub(crate) const SECRET: &str = "bench-secret-of-the-length-that-livekit-asks-for";

/// Ticks of `/proc/*/stat` in a second: the kernel's `USER_HZ`, 100 wherever this can run.
const TICKS_PER_SECOND: f64 = 100.0;
const DEADLINE: Duration = Duration::from_secs(30);

/// Which limits apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limits {
    /// As they are if nobody sets any.
    Default,
    /// None per address and per homeserver: the load comes from one machine and goes to one.
    None,
}

/// A running `jwt-service`. It is killed when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts one that knows the fakes and listens on loopback; it logs to a pipe that is read, as under a
    /// service manager.
    pub(crate) async fn start(program: &Path, fakes: &Fakes, authority: &Path, limits: Limits) -> Self {
        let names = fakes.homeservers().map(|homeserver| homeserver.name());
        let apis = names.clone().map(|name| format!("{name}=https://{name}"));
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("SSL_CERT_FILE", authority)
            .env("LIVEKIT_URL", format!("ws://{}", fakes.sfu.address))
            .env("LIVEKIT_KEY", KEY)
            .env("LIVEKIT_SECRET", SECRET)
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", names.join(","))
            .env("LIVEKIT_CS_API_URL_OVERRIDES", apis.join(","))
            .env("LIVEKIT_JWT_BIND", SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if limits == Limits::None {
            command.env("LIVEKIT_JWT_ADDRESS_RATE", "0").env("LIVEKIT_JWT_SERVER_RATE", "0");
        }
        // For comparing allocators and thread counts by hand.
        for variable in ["MALLOC_ARENA_MAX", "TOKIO_WORKER_THREADS", "LD_PRELOAD"] {
            if let Some(value) = std::env::var_os(variable) {
                command.env(variable, value);
            }
        }
        let mut child = command.spawn().unwrap();
        let (log, stderr) = (Arc::new(Mutex::new(Vec::new())), child.stderr.take().unwrap());
        let (found, listening) = oneshot::channel();
        let lines = log.clone();
        std::thread::spawn(move || {
            let mut found = Some(found);
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("listening")
                    && let Some(found) = found.take()
                {
                    let address = line.rsplit("address=").next().and_then(|address| address.parse().ok());
                    let _ = found.send(address);
                }
                if line.contains(" WARN ") || line.contains("ERROR") || found.is_some() {
                    let mut lines = lines.lock().unwrap();
                    if lines.len() < 100 {
                        lines.push(line);
                    }
                }
            }
        });
        let address: Option<SocketAddr> =
            tokio::time::timeout(DEADLINE, listening).await.ok().and_then(Result::ok).flatten();
        let Some(address) = address else {
            let _ = child.kill();
            panic!("jwt-service did not start:\n{}", log.lock().unwrap().join("\n"));
        };
        Self { child, address, log }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU time used so far, in user space and in the kernel, in seconds.
    pub(crate) fn cpu(&self) -> Cpu {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        // The name in parentheses may hold anything; behind it come the fields from the third on.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let seconds = |field: usize| fields[field - 3].parse::<f64>().unwrap() / TICKS_PER_SECOND;
        Cpu { user: seconds(14), system: seconds(15) }
    }

    /// Resident memory now, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The most that was ever resident, in bytes.
    pub(crate) fn most_resident(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// The first warnings and errors that it logged, but for the one that every start without a store has.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        let lines =
            log.iter().filter(|line| !line.contains("INFO") && !line.contains("kept in memory alone"));
        lines.cloned().collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It holds nothing that matters.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    pub(crate) user: f64,
    pub(crate) system: f64,
}

impl Cpu {
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self { user: self.user - earlier.user, system: self.system - earlier.system }
    }

    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).unwrap().port()
}
