//! Which focus carries a member's media.

use serde_json::json;

use super::*;
use crate::machine::membership::testing::{ALICE, BOB, CAROL, focus, with};

/// A state membership of `sender` with the given focus and selection.
fn routed(sender: &str, created: u64, url: &str, selection: &str) -> MemberEvent {
    let foci = json!([{"type": "livekit", "livekit_service_url": url, "livekit_alias": "!r:example.org"}]);
    let active = json!({"type": "livekit", "focus_selection": selection});
    let content = with(with(state_content("DEVICE"), "foci_preferred", foci), "focus_active", active);
    state_event(sender, created, content)
}

/// The focus of each member, oldest first.
fn foci(events: Vec<MemberEvent>) -> Vec<Option<LiveKitFocus>> {
    let first = |member: &Member| member.transports.first().and_then(Transport::livekit).cloned();
    roster(10_000, events).members().iter().map(first).collect()
}

// Scenario 22.
#[test]
fn oldest_member_decides_for_its_followers() {
    let events = vec![
        routed(ALICE, 1_000, "https://a", "oldest_membership"),
        routed(BOB, 2_000, "https://b", "oldest_membership"),
    ];
    assert_eq!(foci(events), [Some(focus("https://a")), Some(focus("https://a"))]);
}

// Scenario 22.
#[test]
fn followers_follow_an_oldest_member_of_any_mode() {
    let follower = || routed(ALICE, 9_000, "https://a", "oldest_membership");
    let of_alice = |oldest| foci(vec![follower(), oldest])[1].clone();
    assert_eq!(of_alice(routed(BOB, 1_000, "https://b", "multi_sfu")), Some(focus("https://b")));
    assert_eq!(of_alice(sticky(BOB, 1_000, "b")), Some(focus("https://sfu.example")));
    assert_eq!(of_alice(routed(BOB, 1_000, "https://b", "unknown")), None);
}

// Scenarios 23 and 24.
#[test]
fn other_modes_do_not_follow() {
    let events = vec![
        routed(ALICE, 1_000, "https://a", "oldest_membership"),
        routed(BOB, 2_000, "https://b", "multi_sfu"),
        routed(CAROL, 3_000, "https://c", "unknown"),
    ];
    assert_eq!(foci(events), [Some(focus("https://a")), Some(focus("https://b")), None]);
    let events = vec![routed(ALICE, 1_000, "https://a", "oldest_membership"), sticky(BOB, 2_000, "b")];
    assert_eq!(foci(events)[1], Some(focus("https://sfu.example")));
}
