//! Delayed events (MSC4140) in each form that homeservers speak.

use std::time::Duration;

use antiphon_call_sdk::matrix::{
    ApiVersion, DelayId, DelayedAction, DelayedEvent, EventTarget, EventWrite, MatrixPort as _, MatrixReply,
    MatrixRequest, RequestError, ScheduleForm, sdk::SdkRoom,
};
use antiphon_testkit::homeserver::{DelayedForm, DevHomeserver, Options};
use serde_json::json;

use super::support::{HOUR, LIMIT, STATE_MEMBER, STICKY_MEMBER, User, refused, sticky_members, view_until};

const FORMS: [(DelayedForm, ScheduleForm); 3] = [
    (DelayedForm::QueryParameter, ScheduleForm::QueryParameter),
    (DelayedForm::Unstable, ScheduleForm::Dedicated(ApiVersion::Unstable)),
    (DelayedForm::Stable, ScheduleForm::Dedicated(ApiVersion::Stable)),
];

async fn homeserver(form: DelayedForm) -> DevHomeserver {
    DevHomeserver::start(Options { delayed_form: form, ..Options::default() }).await.unwrap()
}

/// A room whose port has read the homeserver's support.
async fn prepared(homeserver: &DevHomeserver) -> (User, SdkRoom) {
    let alice = User::new(homeserver, "alice").await;
    let room = alice.create_room(true, &[]).await;
    let port = alice.port(&room);
    assert!(matches!(port.perform(MatrixRequest::ReadSupport, LIMIT).await, Ok(MatrixReply::Support(_))));
    (alice, port)
}

fn leave(form: ScheduleForm, delay: Duration) -> MatrixRequest {
    let target = EventTarget::State { key: "_key".to_owned() };
    let event = EventWrite { event_type: STATE_MEMBER.to_owned(), target, content: json!({"left": true}) };
    MatrixRequest::Schedule(DelayedEvent { event, delay, form })
}

async fn schedule(port: &SdkRoom, request: MatrixRequest) -> DelayId {
    match port.perform(request, LIMIT).await.unwrap() {
        MatrixReply::Scheduled { delay_id } => delay_id,
        other => panic!("{other:?}"),
    }
}

async fn update(
    port: &SdkRoom,
    delay_id: &DelayId,
    action: DelayedAction,
) -> Result<MatrixReply, RequestError> {
    port.perform(MatrixRequest::UpdateDelayed { delay_id: delay_id.clone(), action }, LIMIT).await
}

#[tokio::test(flavor = "multi_thread")]
async fn leave_restarts_fires_and_is_then_final() {
    for (server, form) in FORMS {
        let homeserver = homeserver(server).await;
        let (_alice, port) = prepared(&homeserver).await;
        let mut updates = port.updates().await;
        let delay_id = schedule(&port, leave(form, Duration::from_secs(2))).await;
        assert_eq!(update(&port, &delay_id, DelayedAction::Restart).await, Ok(MatrixReply::Done), "{form:?}");
        let left = view_until(&port, &mut updates, |view| view.members.first().cloned()).await;
        assert_eq!(
            (left.state_key.as_deref(), left.content),
            (Some("_key"), json!({"left": true})),
            "{form:?}"
        );
        let late = update(&port, &delay_id, DelayedAction::Restart).await.unwrap_err();
        let wanted = match server {
            DelayedForm::QueryParameter => RequestError::NotFound,
            DelayedForm::Unstable | DelayedForm::Stable => RequestError::AlreadyFinal,
        };
        assert_eq!(late, wanted, "{form:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leave_is_sent_early_or_cancelled() {
    for (server, form) in FORMS {
        let homeserver = homeserver(server).await;
        let (_alice, port) = prepared(&homeserver).await;
        let cancelled = schedule(&port, leave(form, HOUR)).await;
        assert_eq!(update(&port, &cancelled, DelayedAction::Cancel).await, Ok(MatrixReply::Done), "{form:?}");
        assert!(update(&port, &cancelled, DelayedAction::Send).await.is_err(), "{form:?}");
        let mut updates = port.updates().await;
        assert_eq!(port.room_view().await.unwrap().members, [], "{form:?}");
        let sent = schedule(&port, leave(form, HOUR)).await;
        assert_eq!(update(&port, &sent, DelayedAction::Send).await, Ok(MatrixReply::Done), "{form:?}");
        view_until(&port, &mut updates, |view| view.members.first().map(drop)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sticky_leave_fires_in_clear_and_sticky() {
    for (server, form) in FORMS {
        let homeserver = homeserver(server).await;
        let (_alice, port) = prepared(&homeserver).await;
        let mut updates = port.updates().await;
        let target = EventTarget::ClearMessage { sticky: Some(HOUR) };
        let event =
            EventWrite { event_type: STICKY_MEMBER.to_owned(), target, content: json!({"sticky_key": "k"}) };
        let delay = Duration::from_millis(10);
        schedule(&port, MatrixRequest::Schedule(DelayedEvent { event, delay, form })).await;
        let seen =
            view_until(&port, &mut updates, |view| sticky_members(view).first().map(|m| (*m).clone())).await;
        assert!(!seen.encrypted, "{form:?}");
        assert!(seen.sticky_until.is_some(), "{form:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_form_is_told() {
    // An unknown path cannot send anything; an unknown parameter is ignored, and the event is sent at once.
    let query = homeserver(DelayedForm::QueryParameter).await;
    let (_alice, port) = prepared(&query).await;
    for version in [ApiVersion::Stable, ApiVersion::Unstable] {
        let form = ScheduleForm::Dedicated(version);
        assert_eq!(refused(&port, leave(form, HOUR)).await, RequestError::Unsupported);
    }
    let dedicated = homeserver(DelayedForm::Stable).await;
    let (_alice, port) = prepared(&dedicated).await;
    let reply = port.perform(leave(ScheduleForm::QueryParameter, HOUR), LIMIT).await;
    assert!(matches!(reply, Ok(MatrixReply::Sent { .. })), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_tells_the_parameter_and_sends_nothing() {
    for (server, understood) in
        [(DelayedForm::QueryParameter, true), (DelayedForm::Unstable, false), (DelayedForm::Stable, false)]
    {
        let homeserver = homeserver(server).await;
        let (alice, port) = prepared(&homeserver).await;
        let mut updates = port.updates().await;
        let reply = port.perform(MatrixRequest::ProbeDelayParameter, LIMIT).await;
        assert_eq!(reply, Ok(MatrixReply::DelayParameter(understood)), "{server:?}");
        let client = alice.session.client();
        let url =
            client.homeserver().join("/_matrix/client/unstable/org.matrix.msc4140/delayed_events").unwrap();
        let scheduled =
            client.http_client().get(url).bearer_auth(client.access_token().unwrap()).send().await.unwrap();
        let scheduled: serde_json::Value = serde_json::from_slice(&scheduled.bytes().await.unwrap()).unwrap();
        assert_eq!(scheduled, json!({"delayed_events": []}), "{server:?}");
        // The next event in the room is one that we schedule.
        schedule(
            &port,
            leave(FORMS.into_iter().find(|(form, _)| *form == server).unwrap().1, Duration::ZERO),
        )
        .await;
        let view =
            view_until(&port, &mut updates, |view| (!view.members.is_empty()).then(|| view.clone())).await;
        assert_eq!((view.members.len(), sticky_members(&view).len()), (1, 0), "{server:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_delay_is_refused_as_such() {
    let options = Options { max_delay: Duration::from_secs(60), ..Options::default() };
    let homeserver = DevHomeserver::start(options).await.unwrap();
    let (_alice, port) = prepared(&homeserver).await;
    let MatrixReply::Support(support) = port.perform(MatrixRequest::ReadSupport, LIMIT).await.unwrap() else {
        panic!("no support")
    };
    assert_eq!(support.max_delay, Some(Duration::from_secs(60)));
    let error = refused(&port, leave(ScheduleForm::QueryParameter, HOUR)).await;
    assert_eq!(error, RequestError::MaxDelayExceeded { max: None });
}
