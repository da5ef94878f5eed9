//! The port and sessions against a real Synapse.

use std::time::Duration;

use antiphon_call_sdk::{
    Session,
    matrix::{
        ApiVersion, DelayedAction, DelayedEvent, EventTarget, EventWrite, MatrixPort as _, MatrixReply,
        MatrixRequest, RequestError, ScheduleForm, TransportSource,
    },
};
use antiphon_testkit::peers::{Peer, Synapse, SynapseOptions, require};
use serde_json::json;

use super::{
    sessions::check_second_start,
    state_members::{
        check_redacted_state_membership, check_redacted_unreadable_state, check_redaction_while_away,
    },
    sticky_members::check_encrypted_membership,
    support::{HOUR, LIMIT, STICKY_MEMBER, User, refused, sticky_members, view_until},
    to_device_outcomes::check_unknown_and_healthy,
};

async fn user(synapse: &Synapse, name: &str) -> User {
    synapse.register(name, "pw").await.unwrap();
    User::log_in(&synapse.url(), name).await
}

#[tokio::test(flavor = "multi_thread")]
async fn members_keys_and_restarts_work() {
    require!(Peer::Synapse);
    let synapse = Synapse::start(SynapseOptions::default()).await.unwrap();
    let (alice, bob) = (user(&synapse, "alice").await, user(&synapse, "bob").await);
    check_encrypted_membership(&alice, &bob).await;
    check_unknown_and_healthy(&alice, &bob).await;
    check_second_start(&alice, bob).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redacted_state_memberships_are_emptied() {
    require!(Peer::Synapse);
    let synapse = Synapse::start(SynapseOptions::default()).await.unwrap();
    let (alice, bob) = (user(&synapse, "alice").await, user(&synapse, "bob").await);
    check_redacted_state_membership(&alice, &bob).await;
    check_redacted_unreadable_state(&alice, bob).await;
    check_redaction_while_away(&alice, user(&synapse, "carol").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delayed_leave_by_query_parameter_fires_sticky() {
    require!(Peer::Synapse);
    let synapse = Synapse::start(SynapseOptions::with_rtc_service("https://jwt.example")).await.unwrap();
    let alice = user(&synapse, "alice").await;
    let port = alice.port(&alice.create_room(true, &[]).await);
    let mut updates = port.updates().await;
    let MatrixReply::Support(support) = port.perform(MatrixRequest::ReadSupport, LIMIT).await.unwrap() else {
        panic!("no support")
    };
    assert_eq!(support.delayed_events, Some(ApiVersion::Unstable));
    assert_eq!((support.sticky_events, support.max_delay), (true, Some(24 * HOUR)));
    let leave = |delay, form| {
        let target = EventTarget::ClearMessage { sticky: Some(HOUR) };
        let event =
            EventWrite { event_type: STICKY_MEMBER.to_owned(), target, content: json!({"sticky_key": "k"}) };
        MatrixRequest::Schedule(DelayedEvent { event, delay, form })
    };
    for version in [ApiVersion::Stable, ApiVersion::Unstable] {
        let form = ScheduleForm::Dedicated(version);
        assert_eq!(refused(&port, leave(HOUR, form)).await, RequestError::Unsupported);
    }
    let probe = port.perform(MatrixRequest::ProbeDelayParameter, LIMIT).await;
    assert_eq!(probe, Ok(MatrixReply::DelayParameter(true)));
    let too_long = refused(&port, leave(48 * HOUR, ScheduleForm::QueryParameter)).await;
    assert!(matches!(too_long, RequestError::MaxDelayExceeded { .. }), "{too_long:?}");
    assert_eq!(sticky_members(&port.room_view().await.unwrap()).len(), 0, "nothing was sent");

    let scheduled = port.perform(leave(Duration::from_secs(3), ScheduleForm::QueryParameter), LIMIT).await;
    let Ok(MatrixReply::Scheduled { delay_id }) = scheduled else { panic!("{scheduled:?}") };
    let update = |action| MatrixRequest::UpdateDelayed { delay_id: delay_id.clone(), action };
    assert_eq!(port.perform(update(DelayedAction::Restart), LIMIT).await, Ok(MatrixReply::Done));
    let seen =
        view_until(&port, &mut updates, |view| sticky_members(view).first().map(|m| (*m).clone())).await;
    assert!(!seen.encrypted && seen.sticky_until.is_some());
    let late = refused(&port, update(DelayedAction::Restart)).await;
    assert!(matches!(late, RequestError::AlreadyFinal | RequestError::NotFound), "{late:?}");

    let unstable = MatrixRequest::Transports(TransportSource::Endpoint(ApiVersion::Unstable));
    let MatrixReply::Transports(foci) = port.perform(unstable, LIMIT).await.unwrap() else {
        panic!("no transports")
    };
    assert_eq!(foci[0].service.as_ref().unwrap().as_str(), "https://jwt.example");
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_key_signs_a_second_device() {
    require!(Peer::Synapse);
    let synapse = Synapse::start(SynapseOptions::default()).await.unwrap();
    let alice = user(&synapse, "alice").await;
    let key = alice.session.client().encryption().recovery().enable().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut options = alice.options.clone();
    options.store = folder.path().to_owned();
    options.recovery_key = Some("EsTx wrong".into());
    let refused = Session::log_in_or_restore(options.clone()).await;
    assert!(matches!(refused, Err(antiphon_call_sdk::SessionError::WrongRecoveryKey(_))), "{refused:?}");
    options.recovery_key = Some(key.into());
    let second = Session::log_in_or_restore(options).await.unwrap();
    let own = second.client().encryption().get_own_device().await.unwrap().unwrap();
    assert!(own.is_cross_signed_by_owner());
}
