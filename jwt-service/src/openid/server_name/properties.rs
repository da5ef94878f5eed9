//! What must hold for any server name.

use std::net::Ipv6Addr;

use super::{Host, MAX_HOST, ServerName};

/// A text that somebody gives for a server name.
pub(crate) fn server_name(text: &str) {
    let parsed = text.parse::<ServerName>();
    assert_eq!(parsed.is_ok(), follows_grammar(text), "{text:?}");
    let Ok(name) = parsed else { return };
    assert_eq!((name.as_str(), &*name.to_string()), (text, text));
    assert!(text.parse::<hyper::http::uri::Authority>().is_ok(), "no authority of a URL: {text:?}");
    assert!(text.parse::<hyper::header::HeaderValue>().is_ok(), "no Host header: {text:?}");
    let again = match name.port() {
        Some(port) => format!("{}:{port}", name.host()),
        None => name.host().to_string(),
    };
    let again: Result<ServerName, _> = again.parse();
    assert!(again.is_ok_and(|again| (again.host(), again.port()) == (name.host(), name.port())), "{text:?}");
    if let Host::Ip(ip) = name.host() {
        assert_eq!(name.is_loopback(), ip.is_loopback());
    }
}

/// The grammar of the Matrix specification (appendices §Server Name), read from the left.
fn follows_grammar(text: &str) -> bool {
    let (host, rest) = match text.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((v6, rest)) => (v6.parse::<Ipv6Addr>().is_ok(), rest),
        None => {
            let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
            let letters = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
            ((1..=MAX_HOST).contains(&host.len()) && host.chars().all(letters), rest)
        }
    };
    let port = |digits: &str| {
        (1..=5).contains(&digits.len())
            && digits.chars().all(|c| c.is_ascii_digit())
            && digits.parse::<u32>().is_ok_and(|port| port <= 65535)
    };
    host && (rest.is_empty() || rest.strip_prefix(':').is_some_and(port))
}
