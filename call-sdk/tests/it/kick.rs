//! Redacting a member's event removes that member from the call (MSC4143).

use std::time::Duration;

use antiphon_call_sdk::{CallEvent, EndReason, MembershipMode, machine::MembershipEnd};
use antiphon_testkit::homeserver::{DevHomeserver, Options};

use crate::support::{OurDevice, create_call_room, log_in, turn};

const LIMIT: Duration = Duration::from_secs(40);
const LEAVE_DELAY: Duration = Duration::from_secs(8);

async fn redaction_ends_the_call(mode: MembershipMode) {
    let _turn = turn().await;
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    for user in ["alice", "bob", "carol"] {
        homeserver.register_user(user, "pw").unwrap();
    }
    let (alice, _folder) = log_in(homeserver.url(), "alice").await;
    let room = create_call_room(&alice).await;
    let via = alice.client().user_id().unwrap().server_name().to_string();
    let bob = OurDevice::enter(homeserver.url(), "bob", room.as_str(), &via).await;
    let carol = OurDevice::enter(homeserver.url(), "carol", room.as_str(), &via).await;
    for device in [&bob, &carol] {
        device.sees_in_room(3).await;
    }
    let (bobs_id, carols_id) = (bob.user(), carol.user());
    let (mut bob, carol) = (bob.join(mode, LEAVE_DELAY).await, carol.join(mode, LEAVE_DELAY).await);
    bob.until_members(LIMIT, &[&carols_id]).await;
    let members = carol.until_members(LIMIT, &[&bobs_id]).await;
    let event_id = members[0].event_id.clone().unwrap();

    alice.client().get_room(&room).unwrap().redact(&event_id, Some("out"), None).await.unwrap();
    let ended = bob.events.until("the end", LIMIT, |event| matches!(event, CallEvent::Ended(_))).await;
    let by = alice.client().user_id().unwrap().to_owned();
    let CallEvent::Ended(EndReason::Membership(reason)) = ended else { panic!("{ended:?}") };
    assert_eq!(reason, MembershipEnd::Removed { by });
    carol.until_members(LIMIT, &[]).await;
    carol.call.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redaction_ends_the_call_in_the_state_form() {
    redaction_ends_the_call(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redaction_ends_the_call_in_the_sticky_form() {
    redaction_ends_the_call(MembershipMode::Matrix2).await;
}
