//! Members in networks that are joined only by a host that forwards nothing: media goes through its TURN server, which
//! the homeserver names.

use std::{path::PathBuf, process::Stdio};

use antiphon_testkit::homeserver::Turn;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use super::{
    process::{MemberProcess, Orders, text},
    *,
};
use crate::speakers::ENOUGH;

/// The host that both networks reach.
const INTERNET: &str = "198.51.100.1";
const HOMESERVER_PORT: &str = "ANTIPHON_TEST_INTERNET";
const SECRET: &str = "turnsecretturnsecret";
const TTL: Duration = Duration::from_secs(15);
const USERS: [&str; 2] = ["alice", "bob"];

/// The homeserver of the host that both networks reach.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "only the process of the test below"]
async fn internet_process() {
    let Ok(ports) = std::env::var(HOMESERVER_PORT) else { return };
    let (port, turn_port) = ports.split_once(' ').unwrap();
    run("ip link set lo up");
    run(&format!("ip addr add {INTERNET}/32 dev lo"));
    let homeserver = DevHomeserver::start(Options::default()).await.unwrap();
    homeserver.set_turn(Some(Turn {
        uris: vec![format!("turn:{INTERNET}:{turn_port}?transport=udp")],
        secret: SECRET.to_owned(),
        ttl: TTL,
    }));
    for user in USERS {
        homeserver.register_user(user, "pw").unwrap();
    }
    let address = SocketAddr::new(INTERNET.parse().unwrap(), port.parse().unwrap());
    let relay = TcpRelay::reserve_at(address).await;
    relay.lead_to(homeserver.address());
    println!("\nserves {}", homeserver.server_name());
    std::future::pending::<()>().await;
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let done = std::process::Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(done.success(), "{command}");
}

/// Waits until a child that is to have a network namespace of its own has it.
async fn until_apart(id: u32) {
    let namespace = |id: &str| std::fs::read_link(format!("/proc/{id}/ns/net")).ok();
    until("in a namespace of its own", LIMIT, async || {
        namespace(&id.to_string()).is_some_and(|other| Some(other) != namespace("self"))
    })
    .await;
}

/// A command in the network namespace of a process.
fn inside(id: u32, command: &str) {
    run(&format!("nsenter --net=/proc/{id}/ns/net {command}"));
}

/// Network number `number`, between a host and the one that both reach.
fn connect(host: u32, internet: u32, number: usize) {
    run(&format!("ip link add name eth0 netns {host} type veth peer name net{number} netns {internet}"));
    inside(internet, &format!("ip addr add 10.0.{number}.1/24 dev net{number}"));
    inside(internet, &format!("ip link set net{number} up"));
    inside(host, "ip link set lo up");
    inside(host, &format!("ip addr add 10.0.{number}.2/24 dev eth0"));
    inside(host, "ip link set eth0 up");
    inside(host, &format!("ip route add default via 10.0.{number}.1"));
}

struct Coturn {
    folder: tempfile::TempDir,
    _process: Child,
}

impl Coturn {
    fn start(internet: u32, binary: PathBuf, port: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let process = Command::new("nsenter")
            .arg(format!("--net=/proc/{internet}/ns/net"))
            .arg(binary)
            .args(["-n", "--no-cli", "--no-tls", "--no-dtls", "--realm=example.org", "--use-auth-secret"])
            .arg(format!("--static-auth-secret={SECRET}"))
            .args([format!("--listening-ip={INTERNET}"), format!("--relay-ip={INTERNET}")])
            .arg(format!("--listening-port={port}"))
            .args(["--log-file=stdout", "--pidfile=pid", "--verbose", "--db=turn.sqlite"])
            .current_dir(folder.path())
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { folder, _process: process }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_cannot_reach_each_other_use_the_homeservers_turn_server() {
    require!(Peer::LoopbackOnly, Peer::Coturn);
    let _turn = turn().await;
    let (port, turn_port) = (ports::free().unwrap(), ports::free().unwrap());
    let mut internet = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "mesh::nat::internet_process", "--ignored", "--nocapture"])
        .env(HOMESERVER_PORT, format!("{port} {turn_port}"))
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let internet_id = internet.id().unwrap();
    let mut lines = BufReader::new(internet.stdout.take().unwrap()).lines();
    let server_name = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(name) = line.strip_prefix("serves ") {
                return name.to_owned();
            }
        }
        panic!("the homeserver did not start");
    };
    let server_name = tokio::time::timeout(LIMIT, server_name).await.unwrap();
    let coturn = Coturn::start(internet_id, Peer::Coturn.find().unwrap(), turn_port);

    let stores = tempfile::tempdir().unwrap();
    let mut room = None;
    let mut members = Vec::new();
    for (number, user) in USERS.into_iter().enumerate() {
        let member = MemberProcess::start_apart(&Orders {
            homeserver: format!("http://{INTERNET}:{port}"),
            user: user.to_owned(),
            store: text(&stores.path().join(user)),
            room: room.clone(),
            bind: None,
        });
        until_apart(member.id()).await;
        connect(member.id(), internet_id, number + 1);
        room = Some(member.room().await.to_string());
        members.push(member);
    }
    let heard = |number: usize| {
        let other = format!("@{}:{server_name}", USERS[1 - number]);
        members[number].opened(&other)
    };
    let begin = Instant::now();
    let reached = async {
        while (0..2).any(|number| heard(number) < ENOUGH) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(LIMIT, reached).await.is_err() {
        panic!("heard {} and {}; coturn: {}", heard(0), heard(1), coturn.log());
    }
    println!("both hear each other through coturn {:?} after joining", begin.elapsed());
    until("relayed by coturn", LIMIT, async || coturn.log().contains("peer usage")).await;

    // Credentials that have run out take nothing from connections that are there.
    let before = [heard(0), heard(1)];
    let after = TTL + Duration::from_secs(5);
    tokio::time::sleep(after).await;
    let expected = u64::try_from(after.as_millis() / FRAME_EVERY.as_millis()).unwrap();
    for number in 0..2 {
        let frames = heard(number) - before[number];
        println!("{} opened {frames} of {expected} frames within {after:?}", USERS[number]);
        assert!(frames > expected * 9 / 10);
    }
    assert!(!coturn.log().contains("error 441"), "{}", coturn.log());
}
