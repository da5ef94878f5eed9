//! The other requests of a call, and refusals as the machine tells them apart.

use std::time::Duration;

use antiphon_call_sdk::{
    MemberId, Slot,
    matrix::{
        ApiVersion, MatrixPort as _, MatrixReply, MatrixRequest, RequestError, RtcTokenRequest,
        TransportSource, TurnServers,
    },
};
use serde_json::json;

use super::support::{LIMIT, User, homeserver, message, refused};

#[tokio::test(flavor = "multi_thread")]
async fn support_transports_openid_and_turn_are_read() {
    let homeserver = homeserver().await;
    homeserver.set_rtc_transports(vec![
        json!({"type": "unknown"}),
        json!({"type": "m.livekit", "url": "wss://sfu.example", "livekit_service_url": "https://jwt.example/"}),
    ]);
    let alice = User::new(&homeserver, "alice").await;
    let port = alice.port(&alice.create_room(false, &[]).await);
    let MatrixReply::Support(support) = port.perform(MatrixRequest::ReadSupport, LIMIT).await.unwrap() else {
        panic!("no support")
    };
    assert_eq!((support.delayed_events, support.sticky_events), (Some(ApiVersion::Unstable), true));
    assert_eq!(support.transports, Some(ApiVersion::Unstable));
    let unstable = MatrixRequest::Transports(TransportSource::Endpoint(ApiVersion::Unstable));
    let MatrixReply::Transports(foci) = port.perform(unstable, LIMIT).await.unwrap() else {
        panic!("no transports")
    };
    assert_eq!(foci.len(), 1);
    assert_eq!(foci[0].sfu.as_ref().unwrap().as_str(), "wss://sfu.example");
    assert_eq!(foci[0].service.as_ref().unwrap().as_str(), "https://jwt.example");
    let stable = MatrixRequest::Transports(TransportSource::Endpoint(ApiVersion::Stable));
    assert_eq!(refused(&port, stable).await, RequestError::Unsupported);
    let well_known = port.perform(MatrixRequest::Transports(TransportSource::WellKnown), LIMIT).await;
    assert_eq!(well_known, Ok(MatrixReply::Transports(Vec::new())));
    let MatrixReply::OpenId(token) = port.perform(MatrixRequest::OpenIdToken, LIMIT).await.unwrap() else {
        panic!("no token")
    };
    assert_eq!(token.matrix_server_name, homeserver.server_name());
    let turn = port.perform(MatrixRequest::TurnServers, LIMIT).await;
    assert_eq!(turn, Ok(MatrixReply::Turn(TurnServers::default())));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_sorted() {
    let homeserver = homeserver().await;
    let alice = User::new(&homeserver, "alice").await;
    let port = alice.port(&alice.create_room(false, &[]).await);
    let token = MatrixRequest::RtcToken(RtcTokenRequest {
        version: ApiVersion::Stable,
        server: None,
        sfu: "wss://sfu.example".parse().unwrap(),
        slot: Slot::room_call(),
        member_id: MemberId("m".to_owned()),
        nested_member: false,
    });
    assert_eq!(refused(&port, token).await, RequestError::Unsupported);
    let send = || message("m.room.message", json!({"body": "x", "msgtype": "m.text"}), None);
    let faults = homeserver.faults();
    faults.rate_limit("PUT /_matrix/client/v3/rooms", 1, Duration::from_secs(3));
    let limited = RequestError::RateLimited { retry_after: Some(Duration::from_secs(3)) };
    assert_eq!(refused(&port, send()).await, limited);
    faults.fail("PUT /_matrix/client/v3/rooms", 1, 502);
    assert!(matches!(refused(&port, send()).await, RequestError::Network { cause } if cause.contains("502")));
    faults.latency("PUT /_matrix/client/v3/rooms", Duration::from_secs(60));
    let late = port.perform(send(), Duration::from_millis(200)).await;
    assert_eq!(late, Err(RequestError::TimedOut));
    faults.clear();
    let address = homeserver.address();
    homeserver.shutdown().await;
    let gone = refused(&port, send()).await.to_string();
    assert!(gone.contains(&format!("localhost:{}: ", address.port())), "{gone}");
}
