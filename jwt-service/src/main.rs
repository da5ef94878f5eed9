//! The program `jwt-service`: environment variables in, an HTTP server out.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    error::Error,
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use antiphon_jwt_service::{Bind, Config, LogLevel, Service, TwirpSfu, listen, serve};
use clap::Parser;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
};

/// How long the health check waits for an answer.
const HEALTH_CHECK_TIME: Duration = Duration::from_secs(5);

/// Admits Matrix users to the rooms of a LiveKit SFU (MSC4195).
///
/// Clients present an OpenID token of their homeserver at /get_token or /sfu/get and receive a token for the
/// SFU. Everything is set with environment variables; the program starts without arguments. Put a reverse
/// proxy with TLS in front of it.
#[derive(Parser)]
#[command(
    name = "jwt-service",
    version,
    after_help = "--help lists the environment variables.",
    after_long_help = ENVIRONMENT
)]
struct Arguments {
    /// Ask a running service on this machine whether it is alive, and exit 0 if it is. It is found with the
    /// same LIVEKIT_JWT_BIND.
    #[arg(long)]
    healthcheck: bool,
}

const ENVIRONMENT: &str = "\
Environment variables (an empty one counts as not set):
  Required
    LIVEKIT_URL                        the SFU as clients reach it, such as wss://sfu.example.com
    LIVEKIT_KEY, LIVEKIT_SECRET        the SFU's API key and secret; or, from files:
    LIVEKIT_KEY_FROM_FILE, LIVEKIT_SECRET_FROM_FILE   each a path of a file that holds it
    LIVEKIT_KEY_FILE                   a path of a file with one line, `key: secret`
    LIVEKIT_FULL_ACCESS_HOMESERVERS    whose users may start calls: server names separated by commas,
                                       or * for all; users of other servers can only join running calls
  Optional
    LIVEKIT_JWT_BIND                   where to listen: host:port, or :port for all interfaces  [:8080]
    LIVEKIT_LOG_LEVEL                  debug, info, warn or error  [info]
    LIVEKIT_CS_API_URL_OVERRIDES       server_name=url, separated by commas
    LIVEKIT_PRIVATE_HOMESERVERS        server names that may be on private addresses; those named in the
                                       two lists above always may, all others must be on public ones
    LIVEKIT_INSECURE_SKIP_VERIFY_TLS   YES_I_KNOW_WHAT_I_AM_DOING turns off all checks of homeservers'
                                       certificates and addresses; for development only
    SSL_CERT_FILE, SSL_CERT_DIR        root certificates, in place of the system's

Try it:
  LIVEKIT_URL=ws://localhost:7880 LIVEKIT_KEY=devkey LIVEKIT_SECRET=secret \\
  LIVEKIT_FULL_ACCESS_HOMESERVERS='*' LIVEKIT_JWT_BIND=127.0.0.1:8080 jwt-service

Exit status: 0 after an orderly stop (SIGTERM, SIGINT) or a good health check, 1 otherwise.";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(&arguments)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Straight to stderr: the log level must not hide why the program did not start.
            let mut stderr = io::stderr().lock();
            let mut cause: Option<&dyn Error> = Some(&*error);
            let mut text = String::from("jwt-service");
            while let Some(error) = cause {
                text.push_str(": ");
                text.push_str(&error.to_string());
                cause = error.source();
            }
            // If even stderr is gone, the exit code still says it.
            let _ = writeln!(stderr, "{text}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let variable = |name: &str| std::env::var(name).ok();
    if arguments.healthcheck {
        return check_health(&Config::bind_from_env(&variable)?).await;
    }
    // One provider for the whole process: with two compiled in, libraries that ask for a default would panic.
    // An error means that it is set already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let Config { settings, bind, log_level, warnings, .. } = Config::from_env(&variable)?;
    start_log(log_level);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let sfu = TwirpSfu::new(&settings.livekit_url, &settings.key, &settings.secret)?;
    tracing::info!(
        livekit_url = settings.livekit_url,
        full_access = %settings.full_access,
        tls = ?settings.insecure_skip_verify_tls,
        "starting"
    );
    let service = Service::new(settings, Arc::new(sfu))?;
    // Before listening: whoever sees us listen may send the signal.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = listen(&bind).await.map_err(|error| {
        format!(
            "LIVEKIT_JWT_BIND: cannot listen on {bind} ({error}); write an address of this machine and a \
             free port"
        )
    })?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    serve(listener, service.router(), async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    })
    .await;
    Ok(())
}

fn start_log(level: LogLevel) {
    let level = match level {
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    };
    // At `debug` the libraries below us would log URLs, and one of them carries the user's token.
    let filter = format!("warn,antiphon_jwt_service={level},jwt_service={level}");
    let filter = if level == "error" { "error".to_owned() } else { filter };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

/// Asks the service at `bind` for `/healthz`.
async fn check_health(bind: &Bind) -> Result<(), Box<dyn Error>> {
    let hosts = match bind.host() {
        None | Some("0.0.0.0" | "::") => vec!["127.0.0.1", "::1"],
        Some(host) => vec![host],
    };
    let mut failure = String::new();
    for host in hosts {
        match tokio::time::timeout(HEALTH_CHECK_TIME, status_line(host, bind.port())).await {
            Ok(Ok(line)) if line.split(' ').nth(1) == Some("200") => return Ok(()),
            Ok(Ok(line)) => failure = format!("it answered {line:?}"),
            Ok(Err(error)) => failure = error.to_string(),
            Err(_) => failure = format!("no answer within {} s", HEALTH_CHECK_TIME.as_secs()),
        }
    }
    Err(format!("not healthy at {bind}: {failure}").into())
}

async fn status_line(host: &str, port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.take(1024).read_to_end(&mut answer).await?;
    let line = answer.split(|b| *b == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}
