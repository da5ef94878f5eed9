//! matrix-js-sdk and a member of ours on a real Synapse: they list each other and have each other's keys, through
//! joins, leaves, crashes and a restart of the homeserver.

use std::time::Duration;

use antiphon_call_sdk::{CallEvent, MembershipMode};
use antiphon_testkit::{
    peers::{JsSdk, JsSdkState, Peer, Session, Synapse, SynapseOptions},
    require,
};

use crate::support::{OurDevice, OurMember, OurProcess, SERVICE, turn};

/// Far longer than anything takes, because the tests have two cores.
const LIMIT: Duration = Duration::from_secs(40);
/// Long enough to be restarted in time by busy processes.
const LEAVE_DELAY: Duration = Duration::from_secs(8);

/// A homeserver with alice, bob and carol, and a room.
struct Place {
    homeserver: Synapse,
    bob: Session,
    carol: Session,
    room: String,
}

impl Place {
    async fn new() -> Self {
        let homeserver = Synapse::start(SynapseOptions::default()).await.unwrap();
        let alice = homeserver.register("alice", "pw").await.unwrap();
        let bob = homeserver.register("bob", "pw").await.unwrap();
        let carol = homeserver.register("carol", "pw").await.unwrap();
        let room = homeserver.create_call_room(&alice).await.unwrap();
        Self { homeserver, bob, carol, room }
    }

    async fn js(&self, user: &Session) -> JsSdk {
        JsSdk::connect(&self.homeserver.url(), user, &self.room, &self.homeserver.server_name())
            .await
            .unwrap()
    }

    async fn ours(&self, user: &str) -> OurDevice {
        OurDevice::enter(&self.homeserver.url(), user, &self.room, &self.homeserver.server_name()).await
    }
}

fn is_sticky(mode: MembershipMode) -> bool {
    mode == MembershipMode::Matrix2
}

/// Awaits that each has the other's newest key, byte by byte, and returns the index of theirs.
async fn share_keys(ours: &mut OurMember, js: &JsSdk, user: &Session) -> u8 {
    let (our_user, our_device) = (ours.own.user(), ours.own.device());
    let state = js
        .until("having our key", LIMIT, |state| {
            let index = ours.call.own_key_index().map(|index| index.0);
            index.is_some() && state.newest_index(&our_user, &our_device) == index
        })
        .await
        .unwrap();
    let our_index = state.newest_index(&our_user, &our_device).unwrap();
    // matrix-js-sdk replaces its key, too, when members come late, so that its index is not known beforehand.
    let their_index = state.newest_index(&user.user_id, &user.device_id).unwrap();
    let keys =
        ours.until_keys("their key", LIMIT, |keys| keys.of(&user.user_id, their_index).is_some()).await;
    let sent = &keys.own(our_index).unwrap().bytes;
    assert_eq!(state.key(&our_user, &our_device, our_index).as_ref(), Some(sent));
    assert_eq!(sent.len(), 32);
    let received = &keys.of(&user.user_id, their_index).unwrap().bytes;
    assert_eq!(state.key(&user.user_id, &user.device_id, their_index).as_ref(), Some(received));
    assert_eq!(state.errors, Vec::<String>::new());
    their_index
}

async fn keys_are_shared_and_replaced(mode: MembershipMode) {
    require!(Peer::Synapse, Peer::Npm);
    let _turn = turn().await;
    let place = Place::new().await;
    let (bob, carol) = (place.js(&place.bob).await, place.js(&place.carol).await);
    let alice = place.ours("alice").await;
    alice.sees_in_room(3).await;
    bob.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    carol.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    let mut alice = alice.join(mode, LEAVE_DELAY).await;
    let bobs_id = &*place.bob.user_id;
    alice.until_members(LIMIT, &[bobs_id, &place.carol.user_id]).await;
    for js in [&bob, &carol] {
        js.until("three members", LIMIT, |state| state.members.len() == 3).await.unwrap();
    }
    let before = alice.call.own_key_index().unwrap().0;
    let bobs_index = share_keys(&mut alice, &bob, &place.bob).await;
    share_keys(&mut alice, &carol, &place.carol).await;
    let bobs_key = |event: &CallEvent| {
        matches!(event, CallEvent::KeyReceived { member, index }
            if member.user_id.as_str() == bobs_id && index.0 == bobs_index)
    };
    alice.events.until("bob's key in use", LIMIT, bobs_key).await;

    carol.leave().await.unwrap();
    alice.until_members(LIMIT, &[bobs_id]).await;
    let in_use = |event: &CallEvent| matches!(event, CallEvent::OwnKeyInUse(index) if index.0 > before);
    let CallEvent::OwnKeyInUse(after) = alice.events.until("another key of ours", LIMIT, in_use).await else {
        unreachable!()
    };
    bob.until("another key of its own", LIMIT, |state| {
        state.newest_index(bobs_id, &place.bob.device_id).is_some_and(|index| index > bobs_index)
    })
    .await
    .unwrap();
    share_keys(&mut alice, &bob, &place.bob).await;
    let keys = alice.keys.borrow().clone();
    assert!(!keys.own(after.0).unwrap().to.contains(&place.carol.user_id), "the leaver got the new key");

    let alices_id = alice.own.user();
    alice.call.leave().await;
    bob.until("our leave", LIMIT, |state| !state.lists(&alices_id)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_shared_and_replaced_in_the_state_form() {
    keys_are_shared_and_replaced(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_shared_and_replaced_in_the_sticky_form() {
    keys_are_shared_and_replaced(MembershipMode::Matrix2).await;
}

async fn killed_processes_disappear(mode: MembershipMode) {
    require!(Peer::Synapse, Peer::Npm);
    let _turn = turn().await;
    let place = Place::new().await;
    let bob = place.js(&place.bob).await;
    let server = (place.homeserver.url(), place.homeserver.server_name());
    let carol = place.ours("carol").await;
    carol.sees_in_room(3).await;
    let alice = OurProcess::start(server.0, "alice", place.room.clone(), server.1, mode, LEAVE_DELAY).await;
    let carol = carol.join(mode, LEAVE_DELAY).await;
    bob.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    carol.until_members(LIMIT, &[&alice.user, &place.bob.user_id]).await;
    bob.until("both of ours", LIMIT, |state| state.members.len() == 3).await.unwrap();

    let alices_id = alice.user.clone();
    alice.kill();
    bob.until("the end of our process", LIMIT, |state| !state.lists(&alices_id)).await.unwrap();
    carol.until_members(LIMIT, &[&place.bob.user_id]).await;
    bob.kill().await.unwrap();
    carol.until_members(LIMIT, &[]).await;
    carol.call.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_processes_disappear_in_the_state_form() {
    killed_processes_disappear(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_processes_disappear_in_the_sticky_form() {
    killed_processes_disappear(MembershipMode::Matrix2).await;
}

async fn call_outlives_a_restart_of_the_homeserver(mode: MembershipMode) {
    require!(Peer::Synapse, Peer::Npm);
    let _turn = turn().await;
    let mut place = Place::new().await;
    // Everybody is in the room from the beginning, because nobody decrypts sticky memberships from before they came.
    let (bob, carol) = (place.js(&place.bob).await, place.js(&place.carol).await);
    let alice = place.ours("alice").await;
    alice.sees_in_room(3).await;
    bob.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    let mut alice = alice.join(mode, LEAVE_DELAY).await;
    let alices_id = alice.own.user();
    alice.until_members(LIMIT, &[&place.bob.user_id]).await;
    let before = bob.until("both", LIMIT, |state| state.members.len() == 2).await.unwrap();
    // With bob's key a sync has brought our own membership. Otherwise we publish again and never doubt it.
    share_keys(&mut alice, &bob, &place.bob).await;

    place.homeserver.stop();
    // Down for so long that the delayed leaves are due when it comes back.
    let gone = |event: &CallEvent| matches!(event, CallEvent::ProbablyLeft(true));
    alice.events.until("doubt about our membership", LIMIT, gone).await;
    place.homeserver.start_again().await.unwrap();
    let back = |event: &CallEvent| matches!(event, CallEvent::ProbablyLeft(false));
    alice.events.until("trust in our membership", LIMIT, back).await;
    // In the sticky form we join again under another id, and so under another identity.
    let is_back = |state: &JsSdkState| {
        let is_new = state.identity(&alices_id) != before.identity(&alices_id);
        state.lists(&alices_id) && (is_new || !is_sticky(mode))
    };
    bob.until("our membership again", LIMIT, |state| is_back(state) && state.members.len() == 2)
        .await
        .unwrap();
    alice.until_members(LIMIT, &[&place.bob.user_id]).await;

    // Keys still travel, those of a newcomer too.
    carol.until("a sync again", LIMIT, |state| state.syncing).await.unwrap();
    carol.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    alice.until_members(LIMIT, &[&place.bob.user_id, &place.carol.user_id]).await;
    carol.until("our membership", LIMIT, is_back).await.unwrap();
    // matrix-js-sdk takes a key that comes in one sync with our new membership for one of the old membership. The next
    // key heals that.
    alice.call.rotate_key().await.unwrap();
    share_keys(&mut alice, &carol, &place.carol).await;
    share_keys(&mut alice, &bob, &place.bob).await;
    alice.call.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_outlives_a_restart_of_the_homeserver_in_the_state_form() {
    call_outlives_a_restart_of_the_homeserver(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_outlives_a_restart_of_the_homeserver_in_the_sticky_form() {
    call_outlives_a_restart_of_the_homeserver(MembershipMode::Matrix2).await;
}

/// What heals is twice the patience of 10 s at most: the key again, and then a renewed membership.
const HEALING: Duration = Duration::from_secs(40);

async fn lost_keys_come_again(mode: MembershipMode) {
    require!(Peer::Synapse, Peer::Npm);
    let _turn = turn().await;
    let place = Place::new().await;
    let bob = place.js(&place.bob).await;
    let alice = place.ours("alice").await;
    alice.sees_in_room(2).await;
    let mut alice = alice.join(mode, LEAVE_DELAY).await;
    alice.deafen.send_replace(true);
    bob.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    let members = alice.until_members(LIMIT, &[&place.bob.user_id]).await;
    let (user, device) = (alice.own.user(), alice.own.device());
    let has_ours = |state: &JsSdkState| state.newest_index(&user, &device).is_some();
    bob.until("our key", LIMIT, has_ours).await.unwrap();

    // Bob's key was lost on its way, and now bob loses ours. All that shows it is that nothing of bob's decrypts.
    bob.forget_keys().await.unwrap();
    alice.deafen.send_replace(false);
    alice.sfu.announce(&members[0].identities[0]).await;
    bob.until("our key again", HEALING, has_ours).await.unwrap();
    // matrix-js-sdk sends its key again only to a membership with another creation time, and replaces it then.
    let bobs_id = &place.bob.user_id;
    let received = |event: &CallEvent| matches!(event, CallEvent::KeyReceived { member, .. } if member.user_id == *bobs_id);
    alice.events.until("bob's key in use", HEALING, received).await;
    bob.until("its own key", LIMIT, |state| state.newest_index(bobs_id, &place.bob.device_id).is_some())
        .await
        .unwrap();
    share_keys(&mut alice, &bob, &place.bob).await;
    alice.call.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_keys_come_again_in_the_state_form() {
    lost_keys_come_again(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_keys_come_again_in_the_sticky_form() {
    lost_keys_come_again(MembershipMode::Matrix2).await;
}

async fn federated_members_share_keys(mode: MembershipMode) {
    require!(Peer::Synapse, Peer::Npm);
    let _turn = turn().await;
    let options = || SynapseOptions::default().and_federation();
    let (here, there) = tokio::join!(Synapse::start(options()), Synapse::start(options()));
    let (here, there) = (here.unwrap(), there.unwrap());
    let creator = here.register("alice", "pw").await.unwrap();
    let bobs = there.register("bob", "pw").await.unwrap();
    let room = here.create_call_room(&creator).await.unwrap();
    let via = here.server_name();
    let bob = JsSdk::connect(&there.url(), &bobs, &room, &via).await.unwrap();
    let alice = OurDevice::enter(&here.url(), "alice", &room, &via).await;
    alice.sees_in_room(2).await;
    let mut alice = alice.join(mode, LEAVE_DELAY).await;
    bob.join(SERVICE, is_sticky(mode), LEAVE_DELAY).await.unwrap();
    alice.until_members(LIMIT, &[&bobs.user_id]).await;
    bob.until("both", LIMIT, |state| state.members.len() == 2).await.unwrap();
    share_keys(&mut alice, &bob, &bobs).await;
    bob.kill().await.unwrap();
    alice.until_members(LIMIT, &[]).await;
    alice.call.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn federated_members_share_keys_in_the_state_form() {
    federated_members_share_keys(MembershipMode::Compatibility).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn federated_members_share_keys_in_the_sticky_form() {
    federated_members_share_keys(MembershipMode::Matrix2).await;
}
