//! The `loadtest` program.

use std::{process::ExitCode, time::Duration};

use antiphon_loadtest::{Plan, run};
use clap::Parser;

/// Fills a room of a LiveKit SFU with participants that send and receive synthetic media, and reports loss, damage
/// and delay.
///
/// Start a focus with `focus serve --dev` and run `loadtest`; the defaults fit. Rooms must be made on join, as --dev
/// does. Every participant is a WebRTC client of its own in this process: two cores carry a few dozen.
///
/// Exit status: 0 if every stream reached every participant undamaged, 1 if not.
#[derive(Parser)]
#[command(name = "loadtest", version)]
struct Options {
    /// URL of the SFU.
    #[arg(long, default_value = "ws://localhost:7880")]
    url: String,
    /// API key.
    #[arg(long, env = "LIVEKIT_API_KEY", default_value = "devkey")]
    api_key: String,
    /// API secret.
    #[arg(long, env = "LIVEKIT_API_SECRET", default_value = "secret", hide_env_values = true)]
    api_secret: String,
    /// Room name.
    #[arg(long, default_value = "loadtest")]
    room: String,
    /// Participants that publish (and receive).
    #[arg(long, default_value_t = 2)]
    publishers: u32,
    /// Participants that only receive.
    #[arg(long, default_value_t = 4)]
    subscribers: u32,
    /// Send video too: VP8 frames at 30 per second.
    #[arg(long)]
    video: bool,
    /// Bytes of a video frame.
    #[arg(long, default_value_t = 4_000)]
    video_frame: usize,
    /// How long to send, in seconds.
    #[arg(long, default_value_t = 10)]
    duration: u64,
    /// Participants that join per second.
    #[arg(long, default_value_t = 5.0)]
    join_rate: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let options = Options::parse();
    let plan = Plan {
        url: options.url,
        api_key: options.api_key,
        api_secret: options.api_secret,
        room: options.room,
        publishers: options.publishers,
        subscribers: options.subscribers,
        video: options.video,
        video_frame: options.video_frame,
        duration: Duration::from_secs(options.duration),
        join_rate: options.join_rate,
    };
    eprintln!(
        "{} publishers and {} subscribers, {} s …",
        plan.publishers, plan.subscribers, options.duration
    );
    match run(&plan).await {
        Ok(report) => {
            print!("{report}");
            if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
