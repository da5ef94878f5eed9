//! Invitations, reactions and raised hands.

use super::*;

impl CallMachine {
    /// Invites the room, from our membership.
    pub(super) fn invite(&mut self, now: Now, attention: Attention) {
        let intent = self.config.intent.clone();
        let event = notify::invite(now, &self.slot, attention, intent.as_deref(), self.own_event_id.as_ref());
        self.write(Origin::Invite, event);
    }

    pub(super) fn raise_hand(&mut self, raised: bool) {
        if raised {
            if let Some(own) = self.own_event_id.clone() {
                self.write(Origin::Hand, notify::raised_hand(&own));
            }
        } else if let Some(event_id) = self.notify.take_own_hand() {
            let request = MatrixRequest::Redact { event_id, reason: None };
            self.request(Origin::Write, request, WRITE_TIMEOUT);
        }
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        let event = match notice {
            Notice::Invited(invite) => CallEvent::Invited(invite),
            Notice::InviteEnded(invite, end) => CallEvent::InviteEnded { invite, end },
            Notice::Declined(user_id) => CallEvent::Declined(user_id),
            Notice::Reaction { member: key, emoji, name } => match self.peers.member(&key) {
                Some(member) => CallEvent::Reaction { member, emoji, name },
                None => return,
            },
            Notice::Hand { member: key, raised } => match self.peers.member(&key) {
                Some(member) => CallEvent::HandRaised { member, raised },
                None => return,
            },
        };
        self.tell(event);
    }

    pub(super) fn write(&mut self, origin: Origin, event: EventWrite) {
        self.request(origin, MatrixRequest::Send(event), WRITE_TIMEOUT);
    }
}
