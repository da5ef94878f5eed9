//! Media keys: ours on their way out, others' on their way in.

use super::*;

impl CallMachine {
    /// Performs what the keys ask for; returns when they have something to do next.
    pub(super) fn drain_keys(&mut self, now: Now) -> Option<Instant> {
        loop {
            match self.keys.poll(now) {
                KeyOutput::Send { id, batch } => {
                    let id = self.next_request(Origin::Keys(id));
                    self.outputs.push_back(Output::SendToDevice { id, batch });
                }
                KeyOutput::Use { index, key } => match self.sealing.switch_to(index, &key) {
                    Ok(()) => {
                        self.timeline.add(now.instant, Step::OwnKeyInUse { index: index.0 });
                        self.tell(CallEvent::OwnKeyInUse(index));
                    }
                    Err(error) => self.leave(now, EndReason::Internal(error.to_string())),
                },
                KeyOutput::Install { member, index, key } => self.install(now, &member, index, &key),
                KeyOutput::Forget { member } => {
                    if let Some(peer) = self.peers.get(&member) {
                        peer.ring.clear();
                    }
                }
                KeyOutput::RenewMembership => self.own.handle(now, own::Input::Renew),
                KeyOutput::Event(event) => self.key_event(now, event),
                KeyOutput::WaitUntil(at) => return Some(at),
                KeyOutput::Idle => return None,
            }
        }
    }

    fn install(&mut self, now: Now, member: &MemberKey, index: KeyIndex, key: &MediaKey) {
        let Some(peer) = self.peers.get(member) else { return };
        if let Err(error) = peer.ring.set(index, key) {
            tracing::error!(%error, "a media key cannot be used");
            return;
        }
        // Frames from before the key were dropped, so the decoder needs a key frame to start from.
        for ((connection, sid), track) in &peer.tracks {
            if track.from.track.codec.is_none_or(|codec| !codec.is_audio()) {
                self.outputs.push_back(Output::RequestKeyFrame { connection: *connection, sid: sid.clone() });
            }
        }
        let event = CallEvent::KeyReceived { member: peer.member.clone(), index };
        let number = self.timeline.number(member);
        self.timeline.add(now.instant, Step::KeyReceived { member: number, index: index.0 });
        self.tell(event);
    }

    fn key_event(&mut self, now: Now, event: KeyEvent) {
        match event {
            KeyEvent::DeliveryFailed { device, failure } => {
                self.tell(CallEvent::KeyDeliveryFailed { device, failure });
            }
            KeyEvent::Refused { device, failure } => self.tell(CallEvent::PeerRefused { device, failure }),
            KeyEvent::Rejected { sender, reason, .. } => {
                self.timeline.add(now.instant, Step::KeyRejected { reason: reason.to_string() });
                self.tell(CallEvent::KeyRejected { sender, reason });
            }
            KeyEvent::Delivered { index } => {
                self.timeline.add(now.instant, Step::OwnKeyDelivered { index: index.0 });
            }
            KeyEvent::RotationSuppressed(_) => {}
        }
    }

    pub(super) fn delivered(&mut self, now: Now, id: RequestId, device: Device, result: Delivery) {
        let send = match self.requests.get(&id) {
            Some(Origin::Keys(send)) => *send,
            Some(Origin::Mesh(message)) => {
                let message = *message;
                self.requests.remove(&id);
                return self.mesh_sent(now, message, result);
            }
            _ => return,
        };
        if let Err(failure) = &result {
            let member = self.timeline.number_of_device(&device);
            self.timeline.add(now.instant, Step::KeyNotSent { member, reason: failure.to_string() });
        }
        self.keys.handle(now, KeyInput::Delivered { id: send, device, result });
    }

    /// Tells the keys what arrives, so that pairs that cannot decrypt are noticed and no key is used for too long.
    pub(super) fn watch_keys(&mut self, now: Now) {
        if let Some(index) = self.sealing.current() {
            let frames = self.sealing.ring().sealed(index);
            self.keys.handle(now, KeyInput::Sealed { index, frames });
        }
        let begin = self.timeline.begin();
        for peer in self.peers.iter() {
            let publishing = peer.tracks.values().any(|track| !track.from.track.muted);
            let opened = peer.tracks.values().filter_map(|track| track.counters.read().last_opened_at(begin));
            let last_authenticated = opened.max();
            let member = peer.member.key();
            self.keys.handle(now, KeyInput::Media { member, publishing, last_authenticated });
        }
    }
}
