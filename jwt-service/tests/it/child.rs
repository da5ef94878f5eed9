//! The program as a child process on ports of its own, which can be killed and started again.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use antiphon_testkit::peers::{ports, process::Process};
use tokio::process::Command;

use crate::support::DEADLINE;

/// A service that is up must say so within this time.
const HEALTHY: Duration = Duration::from_secs(15);
/// How much of a log is shown, in lines.
const TAIL: usize = 40;
/// What has no event is asked for again after this time.
const POLL: Duration = Duration::from_millis(50);

/// The program `jwt-service`; it runs from [`Program::start`] on, except between [`Program::kill`] and the next
/// start.
pub(crate) struct Program {
    environment: BTreeMap<String, String>,
    port: u16,
    operators: u16,
    http: reqwest::Client,
    process: Option<Process>,
    // Last: the folder must outlive the process.
    folder: tempfile::TempDir,
}

impl Program {
    /// One that does not run yet, for an SFU that has to be told its address first.
    pub(crate) fn new() -> Self {
        Self {
            environment: BTreeMap::new(),
            port: ports::free().unwrap(),
            operators: ports::free().unwrap(),
            http: reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap(),
            process: None,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// One with the least that it needs, for tests to which neither SFU nor homeserver matter.
    pub(crate) fn alone() -> Self {
        let mut program = Self::new();
        program
            .set("LIVEKIT_URL", "ws://127.0.0.1:9")
            .set("LIVEKIT_KEY", "devkey")
            .set("LIVEKIT_SECRET", "devsecret")
            .set("LIVEKIT_FULL_ACCESS_HOMESERVERS", "hs.org");
        program
    }

    /// Sets an environment variable; there are no others but those of the listeners.
    pub(crate) fn set(&mut self, variable: &str, value: impl Into<String>) -> &mut Self {
        self.environment.insert(variable.to_owned(), value.into());
        self
    }

    /// Starts it, again if it ran before, and waits until it is healthy.
    pub(crate) async fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jwt-service"));
        command.env_clear().envs(&self.environment);
        command.env("LIVEKIT_JWT_BIND", format!("127.0.0.1:{}", self.port));
        command.env("LIVEKIT_JWT_METRICS_BIND", format!("127.0.0.1:{}", self.operators));
        let mut process = Process::start("jwt-service", command, &self.log().0).unwrap();
        let (http, url) = (self.http.clone(), self.url("/healthz"));
        let healthy = async || http.get(&url).send().await.is_ok_and(|answer| answer.status() == 200);
        process.until("an answer to /healthz", HEALTHY, healthy).await.unwrap();
        self.process = Some(process);
    }

    /// SIGKILL.
    pub(crate) async fn kill(&mut self) {
        self.process.take().expect("it runs").kill().await.unwrap();
    }

    /// `path` at the address that clients and the SFU use.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    /// The address that clients and the SFU use.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Status and body of `path` at the operators' address.
    pub(crate) async fn operators(&self, path: &str) -> (u16, String) {
        let url = format!("http://127.0.0.1:{}{path}", self.operators);
        let answer = self.http.get(url).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// The value of a metric, written as in the text format, without the prefix; 0 if it is not there.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.operators("/metrics").await.1;
        let wanted = format!("jwt_service_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&wanted)).map_or(0, |value| value.parse().unwrap())
    }

    /// Waits until it has no job, and the store knows.
    pub(crate) async fn until_no_job_is_left(&self) {
        let done = async {
            while self.jobs().await > 0 || self.metric("store_unwritten{kind=\"job\"}").await > 0 {
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(DEADLINE, done).await.expect("no job is left");
    }

    /// How many jobs are alive.
    pub(crate) async fn jobs(&self) -> u64 {
        let mut jobs = 0;
        for state in ["waiting", "connected", "leaving", "elsewhere"] {
            jobs += self.metric(&format!("jobs{{state=\"{state}\"}}")).await;
        }
        jobs
    }

    /// A file in its folder.
    pub(crate) fn file(&self, name: &str, content: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A path in its folder.
    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// What all its processes write.
    pub(crate) fn log(&self) -> Log {
        Log(self.folder.path().join("log"))
    }
}

/// A log that may be read while it is written.
pub(crate) struct Log(PathBuf);

impl Log {
    /// Its last lines.
    pub(crate) fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.0).unwrap();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}
