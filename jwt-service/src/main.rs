//! The program `jwt-service`: flags, environment variables and a file in, an HTTP server out.
#![allow(clippy::disallowed_methods, reason = "this is the shell: it owns the clock and the tasks")]

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use antiphon_jwt_service::{
    Bind, Bounds, Certificate, Config, ConfigError, Listener, LogFormat, LogLevel, SETTINGS, Service,
    Sources, TlsFiles, TwirpSfu, listen, serve_with, store,
};
use clap::{Arg, ArgAction, ArgMatches, Command, builder::PathBufValueParser};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How long the health check waits for an answer.
const HEALTH_CHECK_TIME: Duration = Duration::from_secs(5);
/// Connections that tools may hold to the metrics at once.
const METRICS_CONNECTIONS: usize = 64;

const ABOUT: &str = "\
Admits Matrix users to the rooms of a LiveKit SFU (MSC4195).

Clients present an OpenID token of their homeserver at /get_token or /sfu/get and receive a token for the SFU. The
program starts without arguments: every setting can be an environment variable, a key in the file that --config
names, or a flag. Flags win over variables, and these over the file. Put a reverse proxy with TLS in front of it.";

fn main() -> ExitCode {
    let arguments = command().get_matches();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(&arguments)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Straight to stderr: the log level must not hide why the program did not start. If even stderr is
            // gone, the exit code still says it.
            let _ = writeln!(io::stderr(), "jwt-service: {}", in_one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn in_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

fn command() -> Command {
    let question = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    let command = Command::new("jwt-service")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Admits Matrix users to the rooms of a LiveKit SFU (MSC4195)")
        .long_about(ABOUT)
        .after_help("--help lists the environment variables and the keys of the file.")
        .after_long_help(settings_help())
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(PathBufValueParser::new())
                .help("Read settings from this TOML file"),
        )
        .arg(question("check-config").help("Say whether the settings are good, and stop"))
        .arg(question("print-config").help("Print the settings as TOML with their origin, secrets redacted, and stop"))
        .arg(question("healthcheck").help(
            "Ask a running service on this machine whether it is alive, and exit 0 if it is; it is found with \
             the same settings",
        ));
    SETTINGS.iter().fold(command, |command, setting| match setting.flag {
        Some(flag) => command.arg(
            Arg::new(setting.variable).long(flag).value_name("VALUE").hide_long_help(true).help(setting.help),
        ),
        None => command,
    })
}

fn settings_help() -> String {
    let mut text =
        String::from("Settings (environment variable, then key in the file; an empty value is none):\n");
    for setting in SETTINGS {
        let key = setting.key.unwrap_or("-");
        // Writing to a String does not fail.
        let _ = writeln!(text, "  {}  {key}", setting.variable);
        let _ = match setting.default {
            "" => writeln!(text, "      {}", setting.help),
            default => writeln!(text, "      {}  [{default}]", setting.help),
        };
    }
    text.push_str(
        "  SSL_CERT_FILE, SSL_CERT_DIR\n      root certificates, in place of the system's\n\
         Each key is a flag too, with dashes, but for key, secret, redis_url and delayed_event_tokens: other users\nof \
         the machine can read a process's arguments.\n\n\
         Try it:\n  \
         LIVEKIT_URL=ws://localhost:7880 LIVEKIT_KEY=devkey LIVEKIT_SECRET=secret \\\n  \
         LIVEKIT_FULL_ACCESS_HOMESERVERS='*' LIVEKIT_JWT_BIND=127.0.0.1:8080 jwt-service\n\n\
         Exit status: 0 after an orderly stop (SIGTERM, SIGINT), a good check or a good health check; 1 otherwise; \
         2 for\nwrong flags.",
    );
    text
}

fn sources(arguments: &ArgMatches) -> Result<Sources, ConfigError> {
    let mut sources = Sources::from_process()?;
    if let Some(path) = arguments.get_one::<PathBuf>("config") {
        sources = sources.with_file(path)?;
    }
    for setting in SETTINGS.iter().filter(|setting| setting.flag.is_some()) {
        if let Some(value) = arguments.get_one::<String>(setting.variable) {
            sources = sources.with_flag(setting, value.clone());
        }
    }
    Ok(sources)
}

async fn run(arguments: &ArgMatches) -> Result<(), Box<dyn Error>> {
    let sources = sources(arguments)?;
    // One provider for the whole process: with two compiled in, libraries that ask for a default would panic.
    // An error means that it is set already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    if arguments.get_flag("healthcheck") {
        let (bind, tls) = Config::listening(&sources)?;
        return check_health(&bind, tls.is_some()).await;
    }
    if arguments.get_flag("print-config") {
        // Even if they are not good: this is for finding out why.
        io::stdout().write_all(Config::print(&sources).as_bytes())?;
        return Ok(());
    }
    let config = Config::load(&sources)?;
    let certificate = config.tls.clone().map(certificate).transpose()?;
    if arguments.get_flag("check-config") {
        let mut stdout = io::stdout().lock();
        for warning in &config.warnings {
            writeln!(stdout, "warning: {warning}")?;
        }
        writeln!(stdout, "the settings are good")?;
        return Ok(());
    }
    start_log(config.log_level, config.log_format);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    serve(config, certificate).await
}

fn certificate(files: TlsFiles) -> Result<Certificate, String> {
    Certificate::load(files).map_err(|error| {
        format!("LIVEKIT_JWT_TLS_CERT_FILE and LIVEKIT_JWT_TLS_KEY_FILE: {}", in_one_line(&error))
    })
}

async fn serve(config: Config, certificate: Option<Certificate>) -> Result<(), Box<dyn Error>> {
    let Config {
        settings, bind, connections, address_connections, metrics, store, delegation, grace, ..
    } = config;
    let mut bounds = Bounds::default();
    (bounds.connections, bounds.per_address, bounds.grace) = (connections, address_connections, grace);
    bounds.trusted_proxies = settings.limits.trusted_proxies.clone();
    let mut operators_bounds = Bounds::default();
    (operators_bounds.connections, operators_bounds.grace) = (METRICS_CONNECTIONS, Duration::from_secs(1));
    let sfu = TwirpSfu::new(&settings.livekit_url, &settings.key, &settings.secret)?;
    // Only a state directory fails here; a Redis server may come up later.
    let store = store::open(&store)
        .await
        .map_err(|error| format!("LIVEKIT_JWT_STATE_DIR: {}", in_one_line(&*error.source)))?;
    tracing::info!(
        livekit_url = settings.livekit_url,
        full_access = %settings.full_access,
        tls = ?settings.insecure_skip_verify_tls,
        store = store.kind(),
        sanity_interval = ?delegation.sanity_interval,
        "starting"
    );
    let service = Service::with_store(settings, Arc::new(sfu), store, delegation)?;
    // Before listening: whoever sees us listen may send the signal.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let (stop, stopped) = watch::channel(false);
    // Operators' tools see the end, too.
    let (end, ended) = watch::channel(false);

    let operators = match &metrics {
        Some(bind) => {
            let listener = listen_for("LIVEKIT_JWT_METRICS_BIND", bind).await?;
            tracing::info!(address = %listener, "metrics");
            let router = service.operators_router();
            Some(tokio::spawn(serve_with(listener, router, operators_bounds, told(ended))))
        }
        None => None,
    };
    // Before listening: the first webhook may already be about one of these jobs.
    service.restore().await;
    let mut listener = listen_for("LIVEKIT_JWT_BIND", &bind).await?;
    if let Some(certificate) = certificate.clone() {
        listener = listener.with_certificate(certificate);
    }
    tracing::info!(address = %listener, "listening");
    let server = tokio::spawn(serve_with(listener, service.router(), bounds, told(stopped)));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => match certificate.as_ref().map(Certificate::reload) {
                Some(Ok(())) => tracing::info!("certificate read again"),
                Some(Err(error)) => tracing::error!(cause = in_one_line(&error), "the old certificate stays"),
                None => tracing::info!("SIGHUP: there is no certificate to read again"),
            },
        }
    }
    service.stopping();
    tracing::info!("stopping");
    let asked = tokio::time::Instant::now();
    // Each fails only if nobody listens any more, which is what it asks for.
    let _ = stop.send(true);
    server.await?;
    // Requests first: the last of them may still have handed over a leave.
    service.shutdown(grace.saturating_sub(asked.elapsed())).await;
    let _ = end.send(true);
    if let Some(operators) = operators {
        operators.await?;
    }
    tracing::info!("stopped");
    Ok(())
}

async fn told(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it the program.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn listen_for(setting: &str, bind: &Bind) -> Result<Listener, String> {
    listen(bind).await.map_err(|error| {
        format!(
            "{setting}: cannot listen on {bind} ({error}); write an address of this machine and a free port"
        )
    })
}

fn start_log(level: LogLevel, format: LogFormat) {
    let level = match level {
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    };
    // At `debug` the libraries below us would log URLs, and one of them carries the user's token.
    let filter = format!("warn,antiphon_jwt_service={level},jwt_service={level}");
    let filter = if level == "error" { "error".to_owned() } else { filter };
    let log = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Json => {
            log.json().flatten_event(true).with_current_span(true).with_span_list(false).init()
        }
        _ => log.init(),
    }
}

/// Asks the service at `bind` for `/healthz`.
async fn check_health(bind: &Bind, tls: bool) -> Result<(), Box<dyn Error>> {
    let hosts = match bind {
        Bind::Tcp { host: None, .. } => vec!["127.0.0.1", "::1"],
        Bind::Tcp { host: Some(host), .. } if matches!(host.as_str(), "0.0.0.0" | "::") => {
            vec!["127.0.0.1", "::1"]
        }
        Bind::Tcp { host: Some(host), .. } => vec![host.as_str()],
        _ => vec![""],
    };
    let mut failure = String::new();
    for host in hosts {
        let ask = async {
            match bind {
                Bind::Tcp { port, .. } if tls => status_over_tls(host, *port).await,
                Bind::Tcp { port, .. } => status(TcpStream::connect((host, *port)).await?).await,
                Bind::Unix(path) => status(UnixStream::connect(path).await?).await,
                _ => Err("this kind of address cannot be asked".into()),
            }
        };
        match tokio::time::timeout(HEALTH_CHECK_TIME, ask).await {
            Ok(Ok(code)) if code == "200" => return Ok(()),
            Ok(Ok(code)) => failure = format!("it answered {code:?}"),
            Ok(Err(error)) => failure = error.to_string(),
            Err(_) => failure = format!("no answer within {} s", HEALTH_CHECK_TIME.as_secs()),
        }
    }
    Err(format!("not healthy at {bind}: {failure}").into())
}

/// The status code of the answer.
async fn status(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<String, Box<dyn Error>> {
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.take(1024).read_to_end(&mut answer).await?;
    let line = answer.split(|b| *b == b'\r').next().unwrap_or_default();
    Ok(String::from_utf8_lossy(line).split(' ').nth(1).unwrap_or("nothing").to_owned())
}

/// The same over TLS. The certificate is for another name than the one we connect to, and nothing secret is
/// said.
async fn status_over_tls(host: &str, port: u16) -> Result<String, Box<dyn Error>> {
    let client = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).build()?;
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let answer = client.get(format!("https://{host}:{port}/healthz")).send().await?;
    Ok(answer.status().as_u16().to_string())
}
