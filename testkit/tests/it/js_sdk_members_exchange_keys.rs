//! The control for membership and keys: two matrix-js-sdk clients in one encrypted call on a real Synapse.

use std::time::Duration;

use antiphon_testkit::peers::{JsSdk, Peer, Synapse, SynapseOptions, require};

const LIMIT: Duration = Duration::from_secs(20);
const DELAYED_LEAVE: Duration = Duration::from_secs(4);
const SERVICE: &str = "http://localhost:7880/jwt";

#[tokio::test(flavor = "multi_thread")]
async fn they_see_each_other_exchange_keys_and_notice_a_crash() {
    require!(Peer::Synapse, Peer::Npm);
    let homeserver = Synapse::start(SynapseOptions::with_rtc_service(SERVICE)).await.unwrap();
    let alice = homeserver.register("alice", "pw").await.unwrap();
    let bob = homeserver.register("bob", "pw").await.unwrap();
    let room = homeserver.create_call_room(&alice).await.unwrap();
    homeserver.join(&bob, &room).await.unwrap();

    let name = homeserver.server_name();
    let a = JsSdk::connect(&homeserver.url(), &alice, &room, &name).await.unwrap();
    let b = JsSdk::connect(&homeserver.url(), &bob, &room, &name).await.unwrap();
    a.join(SERVICE, false, DELAYED_LEAVE).await.unwrap();
    b.join(SERVICE, false, DELAYED_LEAVE).await.unwrap();

    let both_keys = |state: &antiphon_testkit::peers::JsSdkState| {
        state.members.len() == 2
            && [&alice, &bob].iter().all(|of| state.key(&of.user_id, &of.device_id, 0).is_some())
    };
    let of_a = a.until("both members and both keys", LIMIT, both_keys).await.unwrap();
    let of_b = b.until("both members and both keys", LIMIT, both_keys).await.unwrap();
    for of in [&alice, &bob] {
        let key = of_a.key(&of.user_id, &of.device_id, 0).unwrap();
        assert_eq!(key.len(), 16);
        assert_eq!(Some(key), of_b.key(&of.user_id, &of.device_id, 0));
    }

    b.kill().await.unwrap();
    a.until("bob's delayed leave", LIMIT, |state| state.members.len() == 1).await.unwrap();
}
