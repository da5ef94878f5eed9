//! The one queue between a call and its application: control events and frames, in the order in which they happened.
//!
//! Frames have their own share: a slow application loses frames, never control events. Nothing is allocated per event
//! once the queue has grown to its working size.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::machine::CallEvent;

/// Control events that may wait; an application that lets more pile up has stopped reading.
const CONTROL: usize = 4096;

/// Makes a queue in which `frames` frames may wait.
pub(super) fn queue(frames: usize) -> (EventSender, EventReceiver) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            events: VecDeque::with_capacity(frames.min(1024) + 64),
            frames: 0,
            control: 0,
            sender_gone: false,
            receiver_gone: false,
        }),
        frame_limit: frames.max(1),
        ready: Notify::new(),
    });
    (EventSender { shared: Arc::clone(&shared) }, EventReceiver { shared })
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    frame_limit: usize,
    ready: Notify,
}

#[derive(Debug)]
struct State {
    events: VecDeque<CallEvent>,
    frames: usize,
    control: usize,
    sender_gone: bool,
    receiver_gone: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after every statement, so a panic elsewhere broke nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The call's end of the queue. Clones share it; the queue ends with [`EventSender::end`].
#[derive(Clone, Debug)]
pub(super) struct EventSender {
    shared: Arc<Shared>,
}

/// The application does not read: its queue of control events is full.
#[derive(Debug)]
pub(super) struct NotReading;

impl EventSender {
    /// Queues a frame; false if the application is too slow for it, or has stopped listening.
    pub(super) fn frame(&self, frame: CallEvent) -> bool {
        let mut state = self.shared.lock();
        if state.receiver_gone || state.sender_gone || state.frames >= self.shared.frame_limit {
            return false;
        }
        state.frames += 1;
        state.events.push_back(frame);
        drop(state);
        self.shared.ready.notify_one();
        true
    }

    /// Queues a data message; false if so many events wait that it is dropped. Members choose how many they send, so
    /// they must not be able to end the call.
    pub(super) fn data(&self, message: CallEvent) -> bool {
        let full = self.shared.lock().control >= CONTROL / 2;
        !full && self.control(message).is_ok()
    }

    /// Queues a control event. An application that dropped its receiver only sends: that is not an error.
    pub(super) fn control(&self, event: CallEvent) -> Result<(), NotReading> {
        let mut state = self.shared.lock();
        if state.receiver_gone || state.sender_gone {
            return Ok(());
        }
        if state.control >= CONTROL {
            return Err(NotReading);
        }
        state.control += 1;
        state.events.push_back(event);
        drop(state);
        self.shared.ready.notify_one();
        Ok(())
    }

    /// Queues the last event, whatever waits, and ends the queue.
    pub(super) fn end(&self, last: CallEvent) {
        let mut state = self.shared.lock();
        if !state.sender_gone {
            state.control += 1;
            state.events.push_back(last);
            state.sender_gone = true;
        }
        drop(state);
        self.shared.ready.notify_one();
    }
}

/// The application's end of the queue.
#[derive(Debug)]
pub(super) struct EventReceiver {
    shared: Arc<Shared>,
}

impl EventReceiver {
    /// The next event; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<CallEvent> {
        loop {
            let ready = self.shared.ready.notified();
            {
                let mut state = self.shared.lock();
                if let Some(event) = state.events.pop_front() {
                    match event {
                        CallEvent::Frame { .. } => state.frames -= 1,
                        _ => state.control -= 1,
                    }
                    return Some(event);
                }
                if state.sender_gone {
                    return None;
                }
            }
            ready.await;
        }
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receiver_gone = true;
        state.events.clear();
        state.frames = 0;
        state.control = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        key::KeyIndex,
        machine::{EndReason, IncomingTrack, testing},
        media::{EncodedFrame, TrackSource},
        transport::{Reliability, RemoteTrack, TrackSid, UserData},
    };

    fn frame() -> CallEvent {
        let from = IncomingTrack {
            member: testing::state_member("@a:example.org", "A", 0),
            track: RemoteTrack::new(TrackSid("TR_a".to_owned()), TrackSource::Microphone),
        };
        CallEvent::Frame {
            from: Arc::new(from),
            frame: EncodedFrame { payload: vec![1].into(), timestamp: std::time::Duration::ZERO },
        }
    }

    #[tokio::test]
    async fn frames_fill_their_share_and_control_events_still_pass_in_order() {
        let (sender, mut receiver) = queue(2);
        assert!(sender.frame(frame()));
        sender.control(CallEvent::OwnKeyInUse(KeyIndex(1))).unwrap();
        assert!(sender.frame(frame()));
        assert!(!sender.frame(frame()), "the share of frames is used up");
        sender.end(CallEvent::Ended(EndReason::Left));
        assert!(matches!(receiver.next().await, Some(CallEvent::Frame { .. })));
        assert!(matches!(receiver.next().await, Some(CallEvent::OwnKeyInUse(_))));
        assert!(matches!(receiver.next().await, Some(CallEvent::Frame { .. })));
        assert!(matches!(receiver.next().await, Some(CallEvent::Ended(EndReason::Left))));
        assert!(receiver.next().await.is_none());
    }

    #[tokio::test]
    async fn flood_of_data_does_not_end_the_call() {
        let (sender, _receiver) = queue(1);
        let data = || CallEvent::Data {
            member: testing::state_member("@bob:example.org", "B", 1),
            reliability: Reliability::Reliable,
            message: UserData::default(),
        };
        assert_eq!((0..CONTROL).filter(|_| sender.data(data())).count(), CONTROL / 2);
        assert!(sender.control(CallEvent::OwnKeyInUse(KeyIndex(0))).is_ok());
    }

    #[tokio::test]
    async fn application_that_stops_reading_is_noticed() {
        let (sender, receiver) = queue(1);
        for _ in 0..CONTROL {
            sender.control(CallEvent::OwnKeyInUse(KeyIndex(0))).unwrap();
        }
        assert!(sender.control(CallEvent::OwnKeyInUse(KeyIndex(0))).is_err());
        drop(receiver);
        assert!(sender.control(CallEvent::OwnKeyInUse(KeyIndex(0))).is_ok());
    }

    #[tokio::test]
    async fn waiting_reader_is_woken() {
        let (sender, mut receiver) = queue(1);
        let reading = tokio::spawn(async move { receiver.next().await.is_some() });
        tokio::task::yield_now().await;
        assert!(sender.frame(frame()));
        assert!(reading.await.unwrap());
    }
}
