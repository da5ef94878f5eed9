//! How long joining a call takes until the first frame is decrypted, by step.
//!
//! ```sh
//! cargo bench --package antiphon-call-sdk --bench join --ignore-rust-version
//! cargo bench --package antiphon-call-sdk --bench join --ignore-rust-version -- --synapse
//! ```
//!
//! One member talks in an encrypted call; another joins and leaves 20 times. Everything is on this machine: the
//! focus with its authorisation service in this process, and the homeserver too unless `--synapse` asks for the
//! Synapse that `testkit/verify.sh --setup` installs. The times come from [`Call::report`].
//!
//! Some steps run side by side: the key comes by way of the homeserver while ICE and DTLS connect, so the steps
//! need not add up to the total.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]
#![allow(
    clippy::disallowed_methods,
    reason = "this is the shell of a benchmark: it owns the clock and the tasks"
)]

use std::{path::Path, time::Duration};

use antiphon_call_sdk::{
    Call, CallEvent, CallEvents, CallOptions, CallReport, EncodedFrame, FrameBytes, Session, SessionOptions,
    TrackSpec,
    machine::Step,
    matrix_sdk::ruma::{
        OwnedRoomId,
        api::client::room::create_room::v3::{Request, RoomPreset},
        events::{AnyInitialStateEvent, room::power_levels::RoomPowerLevelsEventContent},
        serde::Raw,
    },
};
use antiphon_focus::{Config, Focus};
use antiphon_testkit::{
    homeserver::{DevHomeserver, Options},
    peers::{Synapse, SynapseOptions},
};
use serde_json::json;
use tokio::time::{Instant, interval, timeout};

const LIMIT: Duration = Duration::from_secs(60);
const FRAME: Duration = Duration::from_millis(20);

#[tokio::main]
async fn main() {
    let has = |name: &str| std::env::args().any(|argument| argument == name);
    // `cargo test` runs benchmarks too, to see that they work.
    let joins = if has("--bench") { 20 } else { 1 };
    let focus = Focus::start(Config::dev_ephemeral()).await.unwrap();
    let homeserver = Homeserver::start(has("--synapse"), focus.jwt_url().unwrap()).await;
    let stores = tempfile::tempdir().unwrap();
    let talker = log_in(&homeserver.url(), "talker", stores.path()).await;
    let listener = log_in(&homeserver.url(), "listener", stores.path()).await;
    let room = create_room(&talker, &listener).await;

    let (talks, mut news) = talker.join_call(&room, CallOptions::default()).await.unwrap();
    let track = talks.publish(TrackSpec::microphone()).await.unwrap();
    let talking = tokio::spawn(async move {
        let payload = FrameBytes::from(vec![7; 80]);
        let (start, mut ticks) = (Instant::now(), interval(FRAME));
        loop {
            let frame = EncodedFrame::new(payload.clone(), ticks.tick().await - start);
            // Refused until our first key exists.
            let _ = track.write(&frame);
        }
    });

    let mut reports = Vec::new();
    for _ in 0..joins {
        let (call, mut events) = listener.join_call(&room, CallOptions::default()).await.unwrap();
        timeout(LIMIT, first_frame(&mut events)).await.expect("no frame came");
        reports.push(call.report().await.unwrap());
        call.leave().await;
        timeout(LIMIT, alone(&talks, &mut news)).await.expect("the listener did not leave");
    }
    print(&reports);

    talking.abort();
    talks.leave().await;
    focus.shutdown().await;
}

enum Homeserver {
    Dev(Box<DevHomeserver>),
    Synapse(Box<Synapse>),
}

impl Homeserver {
    async fn start(synapse: bool, service: &str) -> Self {
        let users = ["talker", "listener"];
        if synapse {
            let synapse = Synapse::start(SynapseOptions::with_rtc_service(service)).await.unwrap();
            for user in users {
                synapse.register(user, "pw").await.unwrap();
            }
            return Self::Synapse(Box::new(synapse));
        }
        let dev = DevHomeserver::start(Options::default()).await.unwrap();
        dev.set_rtc_transports(vec![json!({ "type": "livekit", "livekit_service_url": service })]);
        for user in users {
            dev.register_user(user, "pw").unwrap();
        }
        Self::Dev(Box::new(dev))
    }

    fn url(&self) -> String {
        match self {
            Self::Dev(dev) => dev.url().to_owned(),
            Self::Synapse(synapse) => synapse.localhost_url(),
        }
    }
}

async fn log_in(homeserver: &str, user: &str, stores: &Path) -> Session {
    let options = SessionOptions::new(homeserver.parse().unwrap(), user, "pw", stores.join(user));
    Session::log_in_or_restore(options).await.unwrap()
}

/// An encrypted room with both, whose call both may join.
async fn create_room(creator: &Session, other: &Session) -> OwnedRoomId {
    let encryption = json!({ "type": "m.room.encryption", "state_key": "",
        "content": { "algorithm": "m.megolm.v1.aes-sha2" } });
    let levels = json!({ "events": { "org.matrix.msc3401.call.member": 0 } });
    let mut request = Request::new();
    request.preset = Some(RoomPreset::PublicChat);
    request.initial_state =
        vec![Raw::<AnyInitialStateEvent>::from_json_string(encryption.to_string()).unwrap()];
    request.power_level_content_override = Some(
        Raw::<RoomPowerLevelsEventContent>::from_json_string(levels.to_string()).unwrap().cast_unchecked(),
    );
    let room = creator.client().create_room(request).await.unwrap().room_id().to_owned();
    other.client().join_room_by_id(&room).await.unwrap();
    room
}

async fn first_frame(events: &mut CallEvents) {
    while !matches!(events.next().await.expect("the call ended"), CallEvent::Frame { .. }) {}
}

async fn alone(call: &Call, events: &mut CallEvents) {
    while !call.members().is_empty() {
        events.next().await.expect("the call ended");
    }
}

/// The steps of one join, in milliseconds.
fn steps(report: &CallReport) -> [(&'static str, f64); 9] {
    let at = |is: &dyn Fn(&Step) -> bool| report.first(is).unwrap_or_default();
    let stage = |name: &str| at(&|step| matches!(step, Step::Connection { stage, .. } if *stage == name));
    let discovered = at(&|step| matches!(step, Step::Discovered { .. }));
    let token = at(&|step| matches!(step, Step::Token { .. }));
    let (signalled, ice, dtls) = (stage("signalled"), stage("ice_connected"), stage("media_up"));
    let member = at(&|step| matches!(step, Step::MembershipPublished));
    let key = at(&|step| matches!(step, Step::KeyReceived { .. }));
    let tracks = report.members.iter().flat_map(|member| &member.tracks);
    let frame = tracks.filter_map(|track| track.stats.first_opened).min().unwrap_or_default();
    let took = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() * 1e3;
    [
        ("begin → discovery", took(Duration::ZERO, discovered)),
        ("discovery → token", took(discovered, token)),
        ("token → signalling", took(token, signalled)),
        ("signalling → ICE", took(signalled, ice)),
        ("ICE → DTLS", took(ice, dtls)),
        ("begin → membership", took(Duration::ZERO, member)),
        ("membership → key", took(member, key)),
        ("DTLS and key → frame", took(dtls.max(key), frame)),
        ("total", took(Duration::ZERO, frame)),
    ]
}

fn print(reports: &[CallReport]) {
    let all: Vec<_> = reports.iter().map(steps).collect();
    println!("{} joins, ms:", all.len());
    println!("{:<22}{:>8}{:>8}", "step", "p50", "p95");
    for (step, (name, _)) in all[0].iter().enumerate() {
        let mut times: Vec<f64> = all.iter().map(|join| join[step].1).collect();
        times.sort_by(f64::total_cmp);
        let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
        println!("{name:<22}{:>8.0}{:>8.0}", percentile(50), percentile(95));
    }
}
