//! Full exchanges through the program `jwt-service`: request → OpenID lookup over TLS → CreateRoom → token, against
//! fake homeservers and a fake SFU on this machine.
//!
//! ```sh
//! cargo bench --package antiphon-jwt-service --bench exchanges --ignore-rust-version -- --help
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]
#![allow(
    clippy::disallowed_methods,
    reason = "this is the shell of a benchmark: it owns the clock and the tasks"
)]

mod fakes;
mod load;
mod server;

use std::{
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use antiphon_jwt_service::ParticipantIdentity;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::{
    fakes::{Fakes, Speech},
    load::{Client, Exchange, Outcome, Rooms, Until, burst, closed_loop, open_loop, quantile},
    server::{Limits, SECRET, Server},
};

const REFERENCE: &str = "\
Published for lk-jwt-service (another machine, TLS to the homeserver): about 500 exchanges/s per core of its own CPU,
one TCP connection and full TLS handshake per exchange, 23 MB at rest and 14 kB more with every exchange; 64 requests
to a homeserver that never answers take 30 s each; 2,000 requests at once are all answered, in 3.6 s.";

/// Measures full exchanges through the program jwt-service: request, OpenID lookup over TLS, CreateRoom, token.
///
/// The service is a process of its own; homeservers, SFU and clients are in this one. CPU time is the service's alone,
/// user and kernel, from /proc/PID/stat. Of every figure the median of the repeats is printed. Throughput on a
/// machine with few cores is limited by the clients and fakes too: look at exchanges per second of CPU time, which are
/// not. Latencies need a quiet machine.
#[derive(Parser)]
#[command(
    name = "exchanges",
    after_help = "\
Examples, after `cargo bench --package antiphon-jwt-service --bench exchanges --ignore-rust-version --`:
  (nothing)                                     everything, in under three minutes
  --million                                     memory after a million exchanges, in some minutes more
  --scenario throughput --repeats 5             one scenario, with more repeats
  --scenario latency --rate 200                 the split of latency at another load

Without --bench, as under `cargo test --benches`, a few exchanges are made to see that it works."
)]
struct Arguments {
    /// Only these.
    #[arg(long, value_enum, value_delimiter = ',')]
    scenario: Vec<Scenario>,
    /// How long each measurement of throughput or latency takes.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Measurements of each kind.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Clients at a time where throughput is measured.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Exchanges a second where latency is measured.
    #[arg(long, default_value_t = 300)]
    rate: u32,
    /// Milliseconds that the homeserver takes where latency is measured.
    #[arg(long, default_value_t = 10)]
    homeserver_ms: u64,
    /// Milliseconds that the SFU takes where latency is measured.
    #[arg(long, default_value_t = 3)]
    sfu_ms: u64,
    /// Exchanges before memory is measured.
    #[arg(long, default_value_t = 100_000)]
    exchanges: u64,
    /// A million exchanges before memory is measured.
    #[arg(long, conflicts_with = "exchanges")]
    million: bool,
    /// Live delegated leaves when memory is measured.
    #[arg(long, default_value_t = 10_000)]
    jobs: u64,
    /// Requests at once.
    #[arg(long, default_value_t = 2_000)]
    burst: u32,
    /// Requests to a homeserver that never answers.
    #[arg(long, default_value_t = 64)]
    hanging: usize,
    /// Another build of jwt-service to measure.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_jwt-service"), hide_default_value = true)]
    program: PathBuf,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Exchanges per second of the service's CPU time, by how the homeserver speaks.
    Throughput,
    /// Latency at a steady load, split into homeserver, SFU and ours.
    Latency,
    /// Resident memory: at rest, after many exchanges, with many delegated leaves.
    Memory,
    /// Many requests at once with default limits.
    Burst,
    /// What a homeserver that hangs does to everybody else.
    Hanging,
}

fn main() {
    let mut arguments = Arguments::parse();
    if !arguments.bench {
        arguments.seconds = 0.1;
        arguments.repeats = 1;
        arguments.scenario = vec![Scenario::Throughput];
        println!("a short look, without `cargo bench`: the figures mean nothing");
    } else if arguments.scenario.is_empty() {
        arguments.scenario = Scenario::value_variants().to_vec();
    }
    rustls::crypto::aws_lc_rs::default_provider().install_default().expect("the first to do so");
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(run(&arguments));
}

async fn run(arguments: &Arguments) {
    let directory = tempfile::tempdir().unwrap();
    let authority = directory.path().join("authority.pem");
    let bench = Bench { fakes: Fakes::start(&authority).await, authority, arguments };
    println!("{} cores; {}\n", std::thread::available_parallelism().unwrap(), cpu_name());
    for scenario in &arguments.scenario {
        match scenario {
            Scenario::Throughput => bench.throughput().await,
            Scenario::Latency => bench.latency().await,
            Scenario::Memory => bench.memory().await,
            Scenario::Burst => bench.burst().await,
            Scenario::Hanging => bench.hanging().await,
        }
    }
    println!("{REFERENCE}");
}

struct Bench<'a> {
    fakes: Fakes,
    authority: PathBuf,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    async fn server(&self, limits: Limits) -> Server {
        Server::start(&self.arguments.program, &self.fakes, &self.authority, limits).await
    }

    fn seconds(&self) -> Duration {
        Duration::from_secs_f64(self.arguments.seconds)
    }

    async fn throughput(&self) {
        let server = self.server(Limits::None).await;
        let ways = [
            (Speech::Kept, Rooms::Many, "connections kept, a room each"),
            (Speech::Kept, Rooms::One, "connections kept, one room for all"),
            (Speech::Close, Rooms::Many, "rival: a new TLS connection each, a room each"),
        ];
        let mut measured = [const { Vec::new() }; 3];
        for _ in 0..self.arguments.repeats {
            // In turn, so that a noisy minute hits all of them.
            for ((speech, rooms, _), measured) in ways.iter().zip(&mut measured) {
                measured.push(self.throughput_once(&server, *speech, *rooms).await);
            }
        }
        let rival = median(measured[2].iter().map(|m| m.per_cpu_second));
        let mut table = table(
            "homeserver",
            &[
                "exchanges/s per core",
                "against rival",
                "µs CPU each",
                "of it kernel",
                "exchanges/s",
                "p50 ms",
                "p99 ms",
                "CreateRoom",
                "connections made",
            ],
        );
        for ((_, _, name), measured) in ways.iter().zip(&measured) {
            let of = |value: fn(&Throughput) -> f64| median(measured.iter().map(value));
            table.add_row([
                (*name).to_owned(),
                format!("{:.0}", of(|m| m.per_cpu_second)),
                format!("{:.1}×", of(|m| m.per_cpu_second) / rival),
                format!("{:.0}", of(|m| 1e6 / m.per_cpu_second)),
                format!("{:.0} %", of(|m| m.kernel * 100.0)),
                format!("{:.0}", of(|m| m.per_second)),
                format!("{:.1}", of(|m| m.p50_ms)),
                format!("{:.1}", of(|m| m.p99_ms)),
                format!("{:.0}", of(|m| m.rooms)),
                format!("{:.0}", of(|m| m.connections)),
            ]);
        }
        print(
            &format!(
                "Throughput: {} clients on kept connections, {} s each, median of {}",
                self.arguments.concurrency, self.arguments.seconds, self.arguments.repeats
            ),
            &table,
            &server,
        );
    }

    async fn throughput_once(&self, server: &Server, speech: Speech, rooms: Rooms) -> Throughput {
        let homeserver = self.fakes.homeserver(speech);
        let (name, concurrency) = (homeserver.name(), self.arguments.concurrency);
        let run =
            async |time| closed_loop(server.address, &name, rooms, concurrency, Until::Time(time)).await;
        // Connections of the last repeat have been idle for a while: this makes or finds them.
        run(self.seconds() / 6).await;
        let (cpu, connections) = (server.cpu(), homeserver.connections());
        let made = self.fakes.sfu.seen.requests();
        let mut outcome = run(self.seconds()).await;
        let cpu = server.cpu().since(cpu);
        assert_eq!(outcome.bad, 0, "refused: {:?}", server.complaints());
        let made = self.fakes.sfu.seen.requests() - made;
        assert!(rooms == Rooms::One || made == outcome.good, "every exchange makes its room");
        outcome.latencies.sort_unstable();
        Throughput {
            per_cpu_second: outcome.good as f64 / cpu.total(),
            kernel: cpu.system / cpu.total(),
            per_second: outcome.good as f64 / outcome.took.as_secs_f64(),
            p50_ms: ms(quantile(&outcome.latencies, 0.5)),
            p99_ms: ms(quantile(&outcome.latencies, 0.99)),
            rooms: made as f64,
            connections: (homeserver.connections() - connections) as f64,
        }
    }

    async fn latency(&self) {
        let server = self.server(Limits::None).await;
        let Arguments { rate, homeserver_ms, sfu_ms, repeats, .. } = *self.arguments;
        let mut table = table("exchange of which", &["p50 ms", "p99 ms", "p99.9 ms"]);
        let mut measured = Vec::new();
        let name = self.fakes.kept.name();
        open_loop(server.address, &name, rate, Duration::from_millis(300)).await;
        for _ in 0..repeats {
            self.fakes.kept.seen.measure(Duration::from_millis(homeserver_ms));
            self.fakes.sfu.seen.measure(Duration::from_millis(sfu_ms));
            let exchanges = open_loop(server.address, &name, rate, self.seconds()).await;
            let (homeserver, sfu) = (self.fakes.kept.seen.measured(), self.fakes.sfu.seen.measured());
            let mut parts = [const { Vec::new() }; 4];
            for exchange in exchanges {
                assert_eq!(exchange.status, 200, "refused: {:?}", server.complaints());
                let (homeserver, sfu) = (homeserver[&exchange.number.to_string()], sfu[&exchange.alias]);
                let ours = exchange.latency.saturating_sub(homeserver + sfu);
                for (part, time) in parts.iter_mut().zip([exchange.latency, homeserver, sfu, ours]) {
                    part.push(time);
                }
            }
            parts.iter_mut().for_each(|part| part.sort_unstable());
            measured.push(parts);
        }
        let names = ["all", "homeserver (fake)", "SFU (fake)", "ours, with kernel and client"];
        for (part, name) in names.iter().enumerate() {
            let of = |q| median(measured.iter().map(|parts| ms(quantile(&parts[part], q))));
            table.add_row([
                (*name).to_owned(),
                format!("{:.2}", of(0.5)),
                format!("{:.2}", of(0.99)),
                format!("{:.2}", of(0.999)),
            ]);
        }
        print(
            &format!(
                "Latency: {rate} exchanges a second whatever happens, homeserver {homeserver_ms} ms, SFU {sfu_ms} ms, \
                 median of {repeats}\n\
                 The fakes measure from request read to answer given; all else is counted as ours."
            ),
            &table,
            &server,
        );
    }

    async fn memory(&self) {
        let server = self.server(Limits::None).await;
        let mut table = table("", &["resident MB", "since rest", "most MB"]);
        // What a start leaves to do is done by the first answer.
        let name = self.fakes.kept.name();
        let mut row = |what: String, rest: u64| {
            let (now, most) = (server.resident(), server.most_resident());
            let more = i64::try_from(now).unwrap() - i64::try_from(rest).unwrap();
            table.add_row([what, mb(now), format!("{:+.1} MB", more as f64 / 1e6), mb(most)]);
            now
        };
        let rest = row("at rest, nobody has asked".to_owned(), server.resident());
        assert_eq!(Client::connect(server.address).await.send(&Exchange::next(&name)).await, 200);
        row("after 1 exchange".to_owned(), rest);
        let exchanges = if self.arguments.million { 1_000_000 } else { self.arguments.exchanges };
        let mut done = 0;
        let mut last = rest;
        for goal in [exchanges / 10, exchanges] {
            let more = Until::Exchanges(goal - done);
            let Outcome { bad, .. } =
                closed_loop(server.address, &name, Rooms::Many, self.arguments.concurrency, more).await;
            assert_eq!(bad, 0, "refused: {:?}", server.complaints());
            done = goal;
            last = row(format!("after {goal} exchanges"), rest);
        }
        self.delegate(&server).await;
        let jobs = row(format!("with {} live delegated leaves", self.arguments.jobs), rest);
        print("Memory", &table, &server);
        println!(
            "{:.1} kB a delegated leave\n",
            (jobs as f64 - last as f64) / 1e3 / self.arguments.jobs as f64
        );
    }

    /// Hands leaves over and tells that their participants have joined.
    async fn delegate(&self, server: &Server) {
        let mut clients = tokio::task::JoinSet::new();
        let workers = 32;
        for worker in 0..workers {
            let (address, name) = (server.address, self.fakes.kept.name());
            let share = self.arguments.jobs / workers + u64::from(worker < self.arguments.jobs % workers);
            clients.spawn(async move {
                let mut client = Client::connect(address).await;
                for _ in 0..share {
                    let exchange = Exchange::with_leave(&name);
                    assert_eq!(client.send(&exchange).await, 200);
                    let (webhook, token) = joined(exchange.number, &name, &exchange.alias());
                    assert_eq!(client.send_with(&webhook, Some(&token)).await, 200);
                }
            });
        }
        while let Some(done) = clients.join_next().await {
            done.unwrap();
        }
    }

    async fn burst(&self) {
        let number = self.arguments.burst;
        let mut table = table(
            "requests from",
            &["answered 200", "answered 429", "other", "s for all", "p50 ms", "p99 ms"],
        );
        for (who, many) in [("as many addresses", true), ("one address", false)] {
            let mut measured = Vec::new();
            for _ in 0..self.arguments.repeats {
                // A new one each time: limits have a memory.
                let server = self.server(Limits::Default).await;
                let mut answers = burst(server.address, &self.fakes.kept.name(), number, many).await;
                answers.sort_unstable_by_key(|(_, time)| *time);
                let count = |status| answers.iter().filter(|(s, _)| *s == status).count() as f64;
                let good: Vec<_> = answers.iter().filter(|(s, _)| *s == 200).map(|(_, time)| *time).collect();
                measured.push([
                    count(200),
                    count(429),
                    f64::from(number) - count(200) - count(429),
                    ms(answers.last().unwrap().1) / 1e3,
                    ms(quantile(&good, 0.5)),
                    ms(quantile(&good, 0.99)),
                ]);
            }
            let of = |column: usize| median(measured.iter().map(|m| m[column]));
            table.add_row([
                who.to_owned(),
                format!("{:.0}", of(0)),
                format!("{:.0}", of(1)),
                format!("{:.0}", of(2)),
                format!("{:.2}", of(3)),
                format!("{:.0}", of(4)),
                format!("{:.0}", of(5)),
            ]);
        }
        println!(
            "{number} requests at once, each on a new connection, with default limits, to a service just started"
        );
        println!("{table}\n");
    }

    async fn hanging(&self) {
        let Arguments { rate, repeats, hanging, .. } = *self.arguments;
        let name = self.fakes.kept.name();
        let mut measured = [const { Vec::new() }; 2];
        let mut last = Vec::new();
        for _ in 0..repeats {
            let server = self.server(Limits::None).await;
            open_loop(server.address, &name, rate, Duration::from_millis(300)).await;
            measured[0].push(self.others(&server, &name).await);
            let (address, hangs) = (server.address, self.fakes.hanging.name());
            let before = self.fakes.hanging.seen.requests();
            let mut stuck = tokio::task::JoinSet::new();
            let began = Instant::now();
            for _ in 0..hanging {
                let exchange = Exchange::next(&hangs);
                stuck.spawn(async move { Client::connect(address).await.send(&exchange).await });
            }
            // From when all of them wait; what their handshakes cost is in the other tables. The service lets at
            // most so many talk to one homeserver at a time.
            let waiting = before + hanging.min(128) as u64;
            while self.fakes.hanging.seen.requests() < waiting {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            measured[1].push(self.others(&server, &name).await);
            assert!(stuck.try_join_next().is_none(), "a homeserver that hangs answers nobody");
            // Once it has hung for five seconds, that is known.
            tokio::time::sleep(Duration::from_millis(5200).saturating_sub(began.elapsed())).await;
            let sent = Instant::now();
            let status = Client::connect(address).await.send(&Exchange::next(&hangs)).await;
            last.push(format!("{status} after {:.1} ms", ms(sent.elapsed())));
        }
        let mut table = table("others' exchanges", &["p50 ms", "p99 ms", "p99.9 ms"]);
        let names =
            ["all is well".to_owned(), format!("{hanging} requests wait for a homeserver that hangs")];
        for (name, measured) in names.iter().zip(&measured) {
            let of = |q| median(measured.iter().map(|latencies| ms(quantile(latencies, q))));
            table.add_row([
                name.clone(),
                format!("{:.2}", of(0.5)),
                format!("{:.2}", of(0.99)),
                format!("{:.2}", of(0.999)),
            ]);
        }
        println!("A homeserver that hangs: {rate} exchanges a second of others, median of {repeats}");
        println!("{table}");
        println!("The next request to the homeserver that hangs: {}\n", last.join(", "));
    }

    async fn others(&self, server: &Server, name: &str) -> Vec<Duration> {
        let exchanges = open_loop(server.address, name, self.arguments.rate, self.seconds()).await;
        assert!(
            exchanges.iter().all(|exchange| exchange.status == 200),
            "refused: {:?}",
            server.complaints()
        );
        let mut latencies: Vec<_> = exchanges.iter().map(|exchange| exchange.latency).collect();
        latencies.sort_unstable();
        latencies
    }
}

/// One measurement.
struct Throughput {
    per_cpu_second: f64,
    /// The kernel's part of the CPU time.
    kernel: f64,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// CreateRoom calls.
    rooms: f64,
    /// Made to the homeserver during the measurement.
    connections: f64,
}

/// The SFU's word that the participant of exchange `number` has joined, and the token that signs it.
fn joined(number: u64, name: &str, alias: &str) -> (Exchange, String) {
    let identity =
        ParticipantIdentity::of_member(&format!("@u{number}:{name}"), "DEVICE", &format!("member-{number}"));
    let body = json!({
        "event": "participant_joined", "id": format!("EV_{number}"), "createdAt": "1700000000",
        "room": {"sid": "RM_fHkk3wEnNoWa", "name": alias},
        "participant": {"sid": "PA_fHkk3wEnNoWa", "identity": identity.as_str(), "state": "ACTIVE"},
    })
    .to_string();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({
        "iss": server::KEY, "nbf": now, "exp": now + 300, "sha256": STANDARD.encode(Sha256::digest(body.as_bytes())),
    });
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let token = jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap();
    (Exchange::plain("/sfu_webhook", body), token)
}

fn table(first: &str, columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(std::iter::once(&first).chain(columns));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn print(title: &str, table: &Table, server: &Server) {
    println!("{title}\n{table}");
    for complaint in server.complaints().iter().take(3) {
        println!("the service complained: {complaint}");
    }
    println!();
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.trim().to_owned())
}
