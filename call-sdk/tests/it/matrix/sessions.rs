//! Sessions survive restarts, and their errors name the cause.

use antiphon_call_sdk::{
    Session, SessionError, SessionOptions,
    matrix::{MatrixPort as _, OwnTrust},
};
use matrix_sdk::ruma::api::client::uiaa::{AuthData, MatrixUserIdentifier, Password, UserIdentifier};
use tempfile::tempdir;

use super::support::{User, eventually, homeserver, join_sticky, member, sticky_members};

#[tokio::test(flavor = "multi_thread")]
async fn second_start_is_the_same_device_and_decrypts() {
    let homeserver = homeserver().await;
    let (alice, bob) = (User::new(&homeserver, "alice").await, User::new(&homeserver, "bob").await);
    check_second_start(&alice, bob).await;
}

/// Bob's session ends, Alice joins a call, Bob's session is restored.
pub(super) async fn check_second_start(alice: &User, bob: User) {
    let room = alice.create_room(true, &[&bob]).await;
    let first = bob.session.client().device_id().unwrap().to_owned();
    assert_eq!(bob.port(&room).own_trust().await.unwrap(), OwnTrust::CrossSigned);
    let User { session, options, folder: _folder } = bob;
    drop(session);
    // It comes while Bob is away.
    join_sticky(&alice.port(&room), "one").await;

    let again = eventually("the folder is free again", async || {
        match Session::log_in_or_restore(options.clone()).await {
            Ok(session) => Some(session),
            Err(SessionError::StoreInUse { .. }) => None,
            Err(error) => panic!("{error:?}"),
        }
    })
    .await;
    assert_eq!(again.client().device_id().unwrap(), first);
    let port = again.room(&room, Default::default()).unwrap();
    assert_eq!(port.own_trust().await.unwrap(), OwnTrust::CrossSigned);
    let view = port.room_view().await.unwrap();
    let seen = sticky_members(&view);
    assert_eq!(seen.iter().map(|m| &m.content).collect::<Vec<_>>(), [&member("one")]);
    assert_eq!(seen[0].sender_device.as_deref(), alice.session.client().device_id());
}

#[tokio::test(flavor = "multi_thread")]
async fn second_device_needs_the_recovery_key_or_leave_to_be_unsigned() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let folder = tempdir().unwrap();
    let mut options = alice.options.clone();
    options.store = folder.path().to_owned();
    let refused = Session::log_in_or_restore(options.clone()).await;
    assert!(matches!(refused, Err(SessionError::NotCrossSigned)), "{refused:?}");
    options.recovery_key = Some("EsTc nonsense".into());
    let refused = Session::log_in_or_restore(options.clone()).await;
    assert!(matches!(refused, Err(SessionError::NoSecretStorage)), "{refused:?}");
    options.recovery_key = None;
    options.allow_unsigned_device = true;
    let second = Session::log_in_or_restore(options).await.unwrap();
    assert_ne!(second.client().device_id(), alice.session.client().device_id());
    let devices = second.client().devices().await.unwrap().devices;
    assert_eq!(devices.len(), 3, "the attempts went on with one device beside the registered and the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn obstacles_are_named() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let open = |change: &dyn Fn(&mut SessionOptions)| {
        let mut options = alice.options.clone();
        change(&mut options);
        Session::log_in_or_restore(options)
    };
    let in_use = open(&|_| {}).await;
    assert!(matches!(in_use, Err(SessionError::StoreInUse { .. })), "{in_use:?}");
    let folder = tempdir().unwrap();
    let wrong = open(&|o| (o.store, o.password) = (folder.path().to_owned(), "wrong".into())).await;
    assert!(matches!(wrong, Err(SessionError::WrongCredentials { .. })), "{wrong:?}");
    let nowhere = open(&|o| {
        o.store = folder.path().to_owned();
        o.homeserver = "http://127.0.0.1:9".parse().unwrap();
    });
    let nowhere = nowhere.await;
    let Err(SessionError::Homeserver { source, .. }) = nowhere else { panic!("{nowhere:?}") };
    assert!(source.to_string().contains("127.0.0.1:9: "), "{source}");
    assert!(source.to_string().to_lowercase().contains("refused"), "{source}");
    // After failed attempts the folder can still be used.
    let mut options = alice.options.clone();
    options.store = folder.path().to_owned();
    options.allow_unsigned_device = true;
    drop(Session::log_in_or_restore(options.clone()).await.unwrap());
    options.user = "bob".to_owned();
    let other = Session::log_in_or_restore(options.clone()).await;
    assert!(matches!(other, Err(SessionError::OtherUser { .. })), "{other:?}");
    options.user = "alice".to_owned();
    let (file, aside) = (folder.path().join("session.json"), folder.path().join("aside"));
    std::fs::rename(&file, &aside).unwrap();
    let incomplete = Session::log_in_or_restore(options.clone()).await;
    let Err(SessionError::StoreIncomplete { missing, .. }) = incomplete else { panic!("{incomplete:?}") };
    assert_eq!(missing, "the session file");
    std::fs::rename(&aside, &file).unwrap();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().contains("crypto") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let incomplete = Session::log_in_or_restore(options).await;
    let Err(SessionError::StoreIncomplete { missing, .. }) = incomplete else { panic!("{incomplete:?}") };
    assert_eq!(missing, "the encryption keys");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_device_is_told() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let folder = tempdir().unwrap();
    let mut options = alice.options.clone();
    options.store = folder.path().to_owned();
    options.allow_unsigned_device = true;
    let second = Session::log_in_or_restore(options.clone()).await.unwrap();
    let device = second.client().device_id().unwrap().to_owned();
    let mut syncing = second.syncing();
    assert!(*syncing.borrow_and_update());
    let client = alice.session.client();
    let error = client.delete_devices(std::slice::from_ref(&device), None).await.unwrap_err();
    let user = UserIdentifier::Matrix(MatrixUserIdentifier::new("alice".to_owned()));
    let mut password = Password::new(user, "pw".to_owned());
    password.session = error.as_uiaa_response().unwrap().session.clone();
    client.delete_devices(&[device], Some(AuthData::Password(password))).await.unwrap();
    tokio::time::timeout(super::support::DEADLINE, syncing.wait_for(|syncing| !syncing))
        .await
        .unwrap()
        .unwrap();
    drop(second);
    let gone = eventually("the folder is free again", async || {
        match Session::log_in_or_restore(options.clone()).await {
            Err(SessionError::StoreInUse { .. }) => None,
            outcome => Some(outcome),
        }
    })
    .await;
    assert!(matches!(gone, Err(SessionError::LoggedOut { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_token_is_replaced_for_the_same_device() {
    let homeserver = homeserver().await;
    let User { session, options, folder: _folder } = User::new(&homeserver, "alice").await;
    let (device, token) =
        (session.client().device_id().unwrap().to_owned(), session.client().access_token().unwrap());
    drop(session);
    homeserver.expire_access_token(&token);
    for _ in 0..2 {
        let again = eventually("the folder is free again", async || {
            match Session::log_in_or_restore(options.clone()).await {
                Err(SessionError::StoreInUse { .. }) => None,
                outcome => Some(outcome.unwrap()),
            }
        })
        .await;
        assert_eq!(again.client().device_id().unwrap(), device);
        assert_ne!(again.client().access_token().unwrap(), token);
    }
}
