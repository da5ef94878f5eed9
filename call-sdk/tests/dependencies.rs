//! Without features the crate is pure: its dependency graph holds nothing with sockets, tasks, threads or a clock.
//!
//! `dependencies.txt` lists every crate of that graph, so that a new one is a decision and not an accident.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, process::Command};

const ALLOWED: &str = include_str!("dependencies.txt");

/// Crates that do I/O, run tasks or read a clock. A name that ends with `-` stands for all that begin with it.
const FORBIDDEN: &[&str] = &[
    "async-",
    "aws-lc-",
    "chrono",
    "futures-",
    "h2",
    "hyper",
    "hyper-",
    "livekit-",
    "matrix-sdk",
    "matrix-sdk-",
    "mio",
    "native-tls",
    "openssl",
    "parking_lot",
    "polling",
    "prost",
    "quinn",
    "reqwest",
    "rtc",
    "rtc-",
    "rustls",
    "rustls-",
    "smol",
    "socket2",
    "tokio",
    "tokio-",
    "tower",
    "tungstenite",
    "webrtc",
    "webrtc-",
];

/// The names of the crates in the graph without features, those that run while compiling (macros) included.
fn graph() -> BTreeSet<String> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    // One platform, so that the list does not depend on where the test runs.
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--manifest-path", manifest, "--no-default-features", "--edges", "normal"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--prefix", "none", "--format", "{p}"])
        .args(["--offline", "--locked"])
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo tree failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn graph_without_features_matches_the_list() {
    let (graph, allowed) = (graph(), ALLOWED.lines().map(str::to_owned).collect::<BTreeSet<_>>());
    let new: Vec<_> = graph.difference(&allowed).collect();
    let gone: Vec<_> = allowed.difference(&graph).collect();
    assert!(
        new.is_empty(),
        "new crates without features: {new:?}; drop them, or add them to dependencies.txt"
    );
    assert!(gone.is_empty(), "crates that left the graph: {gone:?}; remove them from dependencies.txt");
}

#[test]
fn graph_without_features_has_no_io() {
    let graph = graph();
    let is_forbidden = |name: &str| {
        FORBIDDEN.iter().any(|entry| name == *entry || entry.ends_with('-') && name.starts_with(entry))
    };
    let found: Vec<_> = graph.iter().filter(|name| is_forbidden(name)).collect();
    assert!(found.is_empty(), "crates that do I/O: {found:?}");
}
