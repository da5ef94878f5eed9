//! A node program that takes commands as lines of JSON and answers in lines of JSON (`testkit/web/lines.mjs`).
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

use super::process::Process;
use super::{Peer, PeerError, folder, web};

/// A running driver. Dropping it ends the program, and with it the browser it started.
#[derive(Debug)]
pub struct Driver {
    peer: &'static str,
    process: Mutex<Process>,
    stdin: tokio::sync::Mutex<ChildStdin>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
    // Last: the folder must outlive the process.
    _folder: TempDir,
}

/// Who waits for which answer. None once the program no longer writes.
type Waiting = Mutex<Option<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

impl Driver {
    /// Starts `script` of `testkit/web` in node 24.
    ///
    /// # Errors
    /// [`PeerError::Missing`] when the npm packages are not installed, [`PeerError::Machine`] when the process
    /// cannot be started.
    pub fn start(peer: &'static str, script: &str, environment: &[(&str, &str)]) -> Result<Self, PeerError> {
        let node = Peer::Npm.find()?;
        let folder_for_log = tempfile::tempdir().map_err(PeerError::machine(peer))?;
        let mut command = Command::new(node);
        command.arg(web().join(script)).env("ANTIPHON_NPM", folder().join("npm"));
        command.envs(environment.iter().copied());
        let log = folder_for_log.path().join("log");
        let (process, stdin, stdout) = Process::start_piped(peer, command, &log)?;
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        tokio::spawn(read_answers(stdout, waiting.clone()));
        Ok(Self {
            peer,
            process: Mutex::new(process),
            stdin: tokio::sync::Mutex::new(stdin),
            waiting,
            next: AtomicU64::new(1),
            _folder: folder_for_log,
        })
    }

    /// Sends a command and awaits its answer.
    ///
    /// # Errors
    /// [`PeerError::Refused`] with the program's own words, [`PeerError::Deadline`] after `limit`,
    /// [`PeerError::Ended`] when the program has ended.
    pub async fn call<T: DeserializeOwned>(
        &self,
        cmd: &str,
        args: Value,
        limit: Duration,
    ) -> Result<T, PeerError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        match locked(&self.waiting).as_mut() {
            Some(waiting) => drop(waiting.insert(id, sender)),
            None => return Err(self.ended()),
        }
        let answer = async {
            let mut line = json!({"id": id, "cmd": cmd, "args": args}).to_string();
            line.push('\n');
            let written = self.stdin.lock().await.write_all(line.as_bytes()).await;
            match written {
                Ok(()) => receiver.await.map_err(|_| self.ended()),
                Err(_) => Err(self.ended()),
            }
        };
        let answer = tokio::time::timeout(limit, answer).await;
        if let Some(waiting) = locked(&self.waiting).as_mut() {
            waiting.remove(&id);
        }
        let value = answer
            .map_err(|_| PeerError::Deadline {
                peer: self.peer,
                what: cmd.to_owned(),
                limit,
                log: self.log_tail(),
            })??
            .map_err(|why| self.refused(cmd, why))?;
        serde_json::from_value(value).map_err(|error| self.refused(cmd, error.to_string()))
    }

    /// The end of what the program (and the page in it) logged.
    pub fn log_tail(&self) -> String {
        locked(&self.process).log_tail()
    }

    /// Ends the program at once, as a crash.
    ///
    /// # Errors
    /// [`PeerError::Machine`] when the system refuses.
    pub async fn kill(self) -> Result<(), PeerError> {
        self.process.into_inner().unwrap_or_else(PoisonError::into_inner).kill().await
    }

    fn ended(&self) -> PeerError {
        let mut process = locked(&self.process);
        process.check().err().unwrap_or_else(|| PeerError::Ended {
            peer: self.peer,
            status: "its output was closed".to_owned(),
            log: process.log_tail(),
        })
    }

    fn refused(&self, what: &str, why: String) -> PeerError {
        PeerError::Refused { peer: self.peer, what: what.to_owned(), why, log: self.log_tail() }
    }
}

async fn read_answers(stdout: ChildStdout, waiting: Arc<Waiting>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(mut message) = serde_json::from_str::<Value>(&line) else { continue };
        let sender = message["id"].as_u64().and_then(|id| locked(&waiting).as_mut()?.remove(&id));
        let answer = match message["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(message["result"].take()),
        };
        if let Some(sender) = sender {
            // A caller that ran into its deadline has gone; nobody misses the answer.
            let _ = sender.send(answer);
        }
    }
    locked(&waiting).take();
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
