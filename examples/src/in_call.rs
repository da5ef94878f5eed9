//! A call that an example is in, until it ends or the program is asked to stop.

use std::pin::Pin;

use antiphon_call_sdk::{Call, CallEvent, CallEvents, EndReason, Session};
use anyhow::{Result, bail};

use crate::trouble;

/// A call that an example is in.
pub struct InCall {
    /// The call.
    pub call: Call,
    events: CallEvents,
    stop: Pin<Box<dyn Future<Output = ()> + Send>>,
    end: Option<EndReason>,
    // Keeps the client syncing.
    _session: Session,
}

impl InCall {
    pub(crate) fn new(session: Session, call: Call, events: CallEvents) -> Self {
        Self { call, events, stop: Box::pin(asked_to_stop()), end: None, _session: session }
    }

    /// The next event; what goes wrong is also told on standard error. `None` when the call has ended or the program is
    /// asked to stop (Ctrl-C, SIGTERM). Cancelling the future loses nothing.
    pub async fn next(&mut self) -> Option<CallEvent> {
        let event = tokio::select! {
            () = &mut self.stop => return None,
            event = self.events.next() => event?,
        };
        if let Some(trouble) = trouble(&event) {
            eprintln!("{trouble}");
        }
        if let CallEvent::Ended(reason) = &event {
            self.end = Some(reason.clone());
        }
        Some(event)
    }

    /// Leaves the call and waits until that is done.
    ///
    /// # Errors
    /// If the call had ended before, with the reason.
    pub async fn leave(self) -> Result<()> {
        self.call.leave().await;
        match self.end {
            None | Some(EndReason::Left) => Ok(()),
            Some(reason) => bail!("the call ended: {reason}"),
        }
    }
}

impl std::fmt::Debug for InCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InCall").field("call", &self.call).finish_non_exhaustive()
    }
}

/// Resolves on Ctrl-C, and on the signal with which service managers stop a program: a bot that just dies stays listed
/// in the call until its delayed leave fires.
async fn asked_to_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    // Without a handler the program simply dies on Ctrl-C.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
