//! A child process with a log file, ended by its id when dropped.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::PeerError;

const LOG_TAIL_BYTES: u64 = 6_000;
const GRACE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);

/// A peer's process. Dropping it sends SIGTERM, waits up to three seconds, then sends SIGKILL; it blocks the
/// thread meanwhile, so that a test that returns leaves nothing behind.
#[derive(Debug)]
pub struct Process {
    peer: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its standard error (and its standard output, unless the caller has piped it with
    /// [`Process::start_piped`]) appended to `log`.
    ///
    /// # Errors
    /// [`PeerError::Machine`] when the log or the process cannot be made.
    pub fn start(peer: &'static str, command: Command, log: &Path) -> Result<Self, PeerError> {
        Self::spawn(peer, command, log, false).map(|(process, _)| process)
    }

    /// As [`Process::start`], with the standard input and output in the caller's hands.
    ///
    /// # Errors
    /// [`PeerError::Machine`] when the log or the process cannot be made.
    pub fn start_piped(
        peer: &'static str,
        command: Command,
        log: &Path,
    ) -> Result<(Self, ChildStdin, ChildStdout), PeerError> {
        let (process, pipes) = Self::spawn(peer, command, log, true)?;
        let (stdin, stdout) = pipes
            .ok_or_else(|| std::io::Error::other("the pipes were not made"))
            .map_err(PeerError::machine(peer))?;
        Ok((process, stdin, stdout))
    }

    fn spawn(
        peer: &'static str,
        mut command: Command,
        log: &Path,
        piped: bool,
    ) -> Result<(Self, Option<(ChildStdin, ChildStdout)>), PeerError> {
        let file = File::options().create(true).append(true).open(log).map_err(PeerError::machine(peer))?;
        if piped {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            let copy = file.try_clone().map_err(PeerError::machine(peer))?;
            command.stdin(Stdio::null()).stdout(copy);
        }
        command.stderr(file).kill_on_drop(true);
        let mut child = command.spawn().map_err(PeerError::machine(peer))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        Ok((Self { peer, child, log: log.to_owned() }, pipes))
    }

    /// The process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// The last lines of what it wrote.
    pub fn log_tail(&self) -> String {
        tail(&self.log).unwrap_or_else(|error| format!("(the log cannot be read: {error})"))
    }

    /// Polls `ready` until it is true.
    ///
    /// # Errors
    /// [`PeerError::Ended`] when the process ended first, [`PeerError::Deadline`] after `limit`.
    pub async fn until<F, R>(&mut self, what: &str, limit: Duration, mut ready: F) -> Result<(), PeerError>
    where
        F: FnMut() -> R,
        R: Future<Output = bool>,
    {
        let end = Instant::now() + limit;
        loop {
            if ready().await {
                return Ok(());
            }
            self.check()?;
            if Instant::now() >= end {
                return Err(PeerError::Deadline {
                    peer: self.peer,
                    what: what.to_owned(),
                    limit,
                    log: self.log_tail(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// # Errors
    /// [`PeerError::Ended`] when the process no longer runs.
    pub fn check(&mut self) -> Result<(), PeerError> {
        match self.child.try_wait().map_err(PeerError::machine(self.peer))? {
            None => Ok(()),
            Some(status) => {
                Err(PeerError::Ended { peer: self.peer, status: status.to_string(), log: self.log_tail() })
            }
        }
    }

    /// SIGKILL, as a crash: the process gets no chance to say good-bye. Returns when it is gone.
    ///
    /// # Errors
    /// [`PeerError::Machine`] when the system refuses.
    pub async fn kill(&mut self) -> Result<(), PeerError> {
        self.child.kill().await.map_err(PeerError::machine(self.peer))
    }

    /// SIGTERM, then SIGKILL after three seconds. Blocks the thread until the process is gone.
    pub fn stop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // The child is not reaped yet, so the id is still its own. The standard library sends only SIGKILL.
        if self.signal("TERM") && self.ended_within(GRACE) {
            return;
        }
        if self.child.start_kill().is_ok() {
            self.ended_within(GRACE);
        }
    }

    fn signal(&self, name: &str) -> bool {
        self.child.id().is_some_and(|id| {
            std::process::Command::new("sh")
                .args(["-c", "kill -\"$1\" \"$2\"", "sh", name, &id.to_string()])
                .status()
                .is_ok_and(|status| status.success())
        })
    }

    fn ended_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < end => std::thread::sleep(POLL),
                Ok(None) => return false,
                Ok(Some(_)) | Err(_) => return true,
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

fn tail(log: &Path) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn runs(id: u32) -> bool {
        Path::new("/proc").join(id.to_string()).exists()
    }

    #[tokio::test]
    async fn an_early_end_is_reported_with_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut process =
            Process::start("a shell", shell("echo the port is taken >&2; exit 3"), &log).unwrap();
        let error = process.until("readiness", Duration::from_secs(10), async || false).await.unwrap_err();
        assert!(
            matches!(&error, PeerError::Ended { status, log, .. }
            if status.contains('3') && log.contains("the port is taken")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_dropped_process_is_gone_even_if_it_ignores_the_request() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        for script in ["echo ready; exec sleep 600", "trap '' TERM; echo ready; while :; do sleep 600; done"]
        {
            std::fs::write(&log, "").unwrap();
            let mut process = Process::start("a shell", shell(script), &log).unwrap();
            let ready = async || std::fs::read_to_string(&log).unwrap().contains("ready");
            process.until("its first line", Duration::from_secs(10), ready).await.unwrap();
            let id = process.id().unwrap();
            assert!(runs(id));
            drop(process);
            assert!(!runs(id), "{script}");
        }
    }
}
