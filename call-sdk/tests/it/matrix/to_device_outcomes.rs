//! Every device gets its own outcome, and no device spoils another's.

use std::{collections::BTreeMap, time::Duration};

use antiphon_call_sdk::{
    Device, Session, SessionOptions,
    matrix::{
        Delivery, DeliveryFailure, MatrixPort as _, MatrixUpdate, ToDeviceBatch, ToDeviceEvent, TrustPolicy,
        sdk::SdkRoom,
    },
};
use matrix_sdk::{
    encryption::LocalTrust,
    ruma::api::client::uiaa::{AuthData, MatrixUserIdentifier, Password, UserIdentifier},
};
use serde_json::json;
use tokio::sync::mpsc;

use super::support::{DEADLINE, User, eventually, homeserver, next};

const KEYS: &str = "io.element.call.encryption_keys";

fn device(user: &User) -> Device {
    let client = user.session.client();
    Device::new(client.user_id().unwrap(), client.device_id().unwrap())
}

async fn deliver(port: &SdkRoom, recipients: &[Device]) -> BTreeMap<Device, Delivery> {
    let batch = ToDeviceBatch {
        event_type: KEYS.to_owned(),
        content: json!({"keys": {"index": 0, "key": "secret"}}),
        recipients: recipients.to_vec(),
    };
    let (tx, mut rx) = mpsc::channel(64);
    let sending = async {
        port.send_to_device(batch, tx).await;
    };
    tokio::time::timeout(DEADLINE, sending).await.expect("every outcome comes");
    let mut outcomes = BTreeMap::new();
    while let Ok((device, outcome)) = rx.try_recv() {
        assert!(outcomes.insert(device, outcome).is_none(), "one outcome for each");
    }
    assert_eq!(outcomes.len(), recipients.len());
    outcomes
}

async fn key_message(updates: &mut mpsc::Receiver<MatrixUpdate>) -> ToDeviceEvent {
    next(updates, |update| match update {
        MatrixUpdate::ToDevice(event) => Some(event),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_device_fails_and_healthy_one_gets_the_message() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_unknown_and_healthy(&alice, &bob).await;
}

/// In a clear room nobody has the device lists of the others until they are asked for.
#[tokio::test(flavor = "multi_thread")]
async fn first_message_in_a_clear_room_turns_out_to_be_of_a_signed_device() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(false, &[&bob]).await;
    let mut updates = bob.port(&room).updates().await;
    assert_eq!(deliver(&alice.port(&room), &[device(&bob)]).await[&device(&bob)], Ok(()));
    let signed = async {
        loop {
            let olm = key_message(&mut updates).await.olm.expect("encrypted");
            if olm.cross_signed {
                assert_eq!(olm.device_id.as_deref(), alice.session.client().device_id());
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, signed).await.expect("the message comes again as that of a signed device");
}

/// Alice sends to Bob's device and to one that does not exist.
pub(super) async fn check_unknown_and_healthy(alice: &User, bob: &User) {
    let room = alice.create_room(true, &[bob]).await;
    let bobs = bob.port(&room);
    let mut updates = bobs.updates().await;
    let unknown = Device::new(bob.session.client().user_id().unwrap(), "NOSUCH");
    let foreign = SdkRoom::new(alice.room(&room), TrustPolicy::CrossSigned).unwrap();
    // A second batch uses the Olm session of the first.
    for port in [alice.port(&room), alice.port(&room), foreign] {
        let outcomes = deliver(&port, &[unknown.clone(), device(bob)]).await;
        assert_eq!(outcomes[&unknown], Err(DeliveryFailure::UnknownDevice));
        assert_eq!(outcomes[&device(bob)], Ok(()));
        let event = key_message(&mut updates).await;
        assert_eq!(
            (event.event_type.as_str(), event.content["keys"]["key"].as_str()),
            (KEYS, Some("secret"))
        );
        let olm = event.olm.expect("encrypted");
        assert_eq!(olm.device_id.as_deref(), alice.session.client().device_id());
        assert!(olm.cross_signed);
        assert_eq!(event.sender, alice.session.client().user_id().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_is_judged_per_device() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let carol = User::new(&homeserver, "carol").await;
    let room = alice.create_room(true, &[&bob, &carol]).await;
    // Bob's second device is not cross-signed.
    let folder = tempfile::tempdir().unwrap();
    let mut options = SessionOptions::new(homeserver.url().parse().unwrap(), "bob", "pw", folder.path());
    options.allow_unsigned_device = true;
    let second = Session::log_in_or_restore(options).await.unwrap();
    let second = Device::new(second.client().user_id().unwrap(), second.client().device_id().unwrap());
    let recipients = [device(&bob), second.clone(), device(&carol)];

    let outcomes = deliver(&alice.port(&room), &recipients).await;
    assert_eq!(outcomes[&second], Err(DeliveryFailure::NotCrossSigned));
    assert_eq!((&outcomes[&device(&bob)], &outcomes[&device(&carol)]), (&Ok(()), &Ok(())));
    let anybody = alice.session.room(&room, TrustPolicy::AnyDevice).unwrap();
    assert!(deliver(&anybody, &recipients).await.into_values().all(|outcome| outcome.is_ok()));

    let encryption = alice.session.client().encryption();
    let carols = device(&carol);
    let carols_keys = encryption.get_device(&carols.user_id, &carols.device_id).await.unwrap().unwrap();
    carols_keys.set_local_trust(LocalTrust::BlackListed).await.unwrap();
    let outcomes = deliver(&anybody, &recipients).await;
    assert_eq!(outcomes[&carols], Err(DeliveryFailure::Blocked));
    assert_eq!(outcomes[&device(&bob)], Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_identity_of_a_verified_user_spoils_only_that_user() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let carol = User::new(&homeserver, "carol").await;
    let room = alice.create_room(true, &[&bob, &carol]).await;
    let port = alice.port(&room);
    let mut updates = port.updates().await;
    let encryption = alice.session.client().encryption();
    let bobs_id = bob.session.client().user_id().unwrap();
    encryption.request_user_identity(bobs_id).await.unwrap().unwrap().verify().await.unwrap();
    assert!(encryption.request_user_identity(bobs_id).await.unwrap().unwrap().is_verified());
    let reset = bob.session.client().encryption().reset_cross_signing().await.unwrap();
    if let Some(reset) = reset {
        let user = UserIdentifier::Matrix(MatrixUserIdentifier::new("bob".to_owned()));
        let matrix_sdk::encryption::CrossSigningResetAuthType::Uiaa(uiaa) = reset.auth_type() else {
            panic!("OAuth")
        };
        let mut password = Password::new(user, "pw".to_owned());
        password.session = uiaa.session.clone();
        reset.auth(Some(AuthData::Password(password))).await.unwrap();
    }
    next(&mut updates, |update| match update {
        MatrixUpdate::TrustChanged { user_id } => (user_id == bobs_id).then_some(()),
        _ => None,
    })
    .await;
    let outcome = async || deliver(&port, &[device(&bob), device(&carol)]).await;
    let outcomes = eventually("the new identity is known", async || {
        let outcomes = outcome().await;
        outcomes[&device(&bob)].is_err().then_some(outcomes)
    })
    .await;
    assert_eq!(outcomes[&device(&bob)], Err(DeliveryFailure::IdentityChanged));
    assert_eq!(outcomes[&device(&carol)], Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn own_device_without_cross_signing_still_sends() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let folder = tempfile::tempdir().unwrap();
    let mut options = SessionOptions::new(homeserver.url().parse().unwrap(), "alice", "pw", folder.path());
    options.allow_unsigned_device = true;
    let second = Session::log_in_or_restore(options).await.unwrap();
    let bobs = bob.port(&room);
    let mut updates = bobs.updates().await;
    let port = second.room(&room, TrustPolicy::CrossSigned).unwrap();
    assert_eq!(deliver(&port, &[device(&bob)]).await[&device(&bob)], Ok(()));
    let olm = key_message(&mut updates).await.olm.unwrap();
    assert_eq!(olm.device_id.as_deref(), second.client().device_id());
    assert!(!olm.cross_signed, "Bob is told");
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_the_homeserver_are_told_apart() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    let room = alice.create_room(true, &[&bob]).await;
    let (port, bob) = (alice.port(&room), device(&bob));
    let faults = homeserver.faults();
    faults.fail("POST /_matrix/client/v3/keys/claim", 1, 502);
    let outcome = deliver(&port, std::slice::from_ref(&bob)).await[&bob].clone();
    assert!(matches!(outcome, Err(DeliveryFailure::Network(_))), "{outcome:?}");
    assert_eq!(deliver(&port, std::slice::from_ref(&bob)).await[&bob], Ok(()));
    faults.rate_limit("PUT /_matrix/client/v3/sendToDevice", 1, Duration::from_secs(7));
    let outcome = deliver(&port, std::slice::from_ref(&bob)).await[&bob].clone();
    assert_eq!(outcome, Err(DeliveryFailure::RateLimited { retry_after: Some(Duration::from_secs(7)) }));
    assert_eq!(faults.outstanding(), 0);
}
