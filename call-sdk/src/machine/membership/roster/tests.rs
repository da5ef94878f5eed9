//! Rosters of whole room views, on virtual time.

mod change;
mod expiry;
mod focus;
mod forms;
mod other_slots;
mod soundness;

use super::*;
use crate::{
    machine::membership::testing::{at, state_content, state_event, sticky_content, sticky_event, view},
    matrix::MemberEvent,
};

fn roster(now: u64, events: Vec<MemberEvent>) -> Roster {
    let mut roster = Roster::new(Slot::room_call());
    roster.update(at(now), &view(events));
    roster
}

/// A state membership of the one device of `sender`.
fn state(sender: &str, sent: u64) -> MemberEvent {
    state_event(sender, sent, state_content("DEVICE"))
}

/// A sticky membership of the one device of `sender`.
fn sticky(sender: &str, sent: u64, member_id: &str) -> MemberEvent {
    sticky_event(sender, sent, sticky_content(sender, "DEVICE", member_id))
}

fn names(roster: &Roster) -> Vec<&str> {
    roster.members().iter().map(|member| member.user_id.as_str()).collect()
}

fn forms(roster: &Roster) -> Vec<MembershipForm> {
    roster.members().iter().map(|member| member.form).collect()
}
