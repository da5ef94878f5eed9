//! A LiveKit focus as membership and discovery name it, and its URLs in one spelling.

use std::{fmt, net::IpAddr, str::FromStr};

use ruma_common::OwnedUserId;
use url::{Host, Url};

/// Longest URL taken from an event or an answer, in bytes.
const MAX_URL: usize = 2048;

/// A LiveKit deployment: its authorisation service, its SFU, or both (MSC4195). At least one is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LiveKitFocus {
    /// `livekit_service_url`.
    pub service: Option<ServiceUrl>,
    /// `url` of an `m.livekit` transport.
    pub sfu: Option<SfuUrl>,
}

impl LiveKitFocus {
    /// The focus behind an authorisation service.
    #[must_use]
    pub fn of_service(service: ServiceUrl) -> Self {
        Self { service: Some(service), sfu: None }
    }

    /// The focus whose SFU is at `sfu`; tokens come from homeservers.
    #[must_use]
    pub fn of_sfu(sfu: SfuUrl) -> Self {
        Self { service: None, sfu: Some(sfu) }
    }

    /// Whether both name one deployment: the same SFU, or the same authorisation service.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let same_sfu = self.sfu.is_some() && self.sfu == other.sfu;
        let same_service = self.service.is_some() && self.service == other.service;
        same_sfu || same_service
    }

    /// Takes the URLs of `other`, a listing of the same deployment, where this one has none.
    pub fn fill_from(&mut self, other: &Self) {
        self.service = self.service.take().or_else(|| other.service.clone());
        self.sfu = self.sfu.take().or_else(|| other.sfu.clone());
    }
}

impl fmt::Display for LiveKitFocus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.service, &self.sfu) {
            (Some(service), _) => fmt::Display::fmt(service, f),
            (None, Some(sfu)) => fmt::Display::fmt(sfu, f),
            (None, None) => f.write_str("(no URL)"),
        }
    }
}

/// Where we have a focus from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// An option of the application.
    Application,
    /// Our own homeserver: its transports endpoint, or its well-known file.
    Homeserver,
    /// The memberships of these joined users, oldest first.
    Members(Vec<OwnedUserId>),
}

impl fmt::Display for NamedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Application => f.write_str("the application"),
            Self::Homeserver => f.write_str("our homeserver"),
            Self::Members(users) => match users.as_slice() {
                [] => f.write_str("no member"),
                [user] => fmt::Display::fmt(user, f),
                [user, rest @ ..] => write!(f, "{user} and {} more", rest.len()),
            },
        }
    }
}

/// The base URL of an authorisation service, in one spelling: lower-case scheme and host, no default port, no trailing
/// slash, no query, no fragment, no user name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceUrl(String);

impl ServiceUrl {
    /// The URL as text; paths are appended with a `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is an `https` URL.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// Whether its host is this machine: `localhost`, a name below it, or a loopback address.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }

    /// The address, if the host is one and not a name.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        address(&self.0)
    }
}

impl FromStr for ServiceUrl {
    type Err = FocusUrlError;

    fn from_str(text: &str) -> Result<Self, FocusUrlError> {
        let url = parse(text)?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(FocusUrlError::Scheme { wanted: "https" });
        }
        Ok(Self(spelling(&url, url.scheme())))
    }
}

impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The WebSocket URL of an SFU, in one spelling. `https` reads as `wss` and `http` as `ws`, so that two names of one
/// SFU are one connection: two would evict each other as duplicates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SfuUrl(String);

impl SfuUrl {
    /// The URL as text, with scheme `ws` or `wss`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether its host is this machine: `localhost`, a name below it, or a loopback address.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }

    /// The address, if the host is one and not a name.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        address(&self.0)
    }
}

impl FromStr for SfuUrl {
    type Err = FocusUrlError;

    fn from_str(text: &str) -> Result<Self, FocusUrlError> {
        let url = parse(text)?;
        let scheme = match url.scheme() {
            "ws" | "http" => "ws",
            "wss" | "https" => "wss",
            _ => return Err(FocusUrlError::Scheme { wanted: "wss" }),
        };
        Ok(Self(spelling(&url, scheme)))
    }
}

impl fmt::Display for SfuUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not the URL of a focus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FocusUrlError {
    /// Not a URL with a host, or one with control characters.
    #[error("not a URL with a host name")]
    Malformed,
    /// Another scheme.
    #[error("the URL must start with {wanted}://")]
    Scheme {
        /// The usual scheme.
        wanted: &'static str,
    },
    /// A user name or password in it: they would leak into logs.
    #[error("the URL must not contain a user name or password")]
    Credentials,
    /// Longer than 2048 bytes.
    #[error("the URL is longer than 2048 bytes")]
    TooLong,
}

fn parse(text: &str) -> Result<Url, FocusUrlError> {
    if text.len() > MAX_URL {
        return Err(FocusUrlError::TooLong);
    }
    if text.chars().any(char::is_control) {
        return Err(FocusUrlError::Malformed);
    }
    let url = Url::parse(text).map_err(|_| FocusUrlError::Malformed)?;
    if url.host_str().is_none_or(|host| host.trim_end_matches('.').is_empty()) {
        return Err(FocusUrlError::Malformed);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(FocusUrlError::Credentials);
    }
    Ok(url)
}

/// `Url` has already lowered scheme and host and dropped the default port.
fn spelling(url: &Url, scheme: &str) -> String {
    let host = match url.host() {
        // A trailing dot names the same host.
        Some(Host::Domain(name)) => name.trim_end_matches('.').to_owned(),
        Some(host) => host.to_string(),
        None => String::new(),
    };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{}", url.path().trim_end_matches('/'))
}

/// The host of one of our spellings. Its schemes are special ones, so addresses come parsed, whatever their notation.
fn host(spelling: &str) -> Option<Host<String>> {
    Url::parse(spelling).ok()?.host().map(|host| host.to_owned())
}

fn address(spelling: &str) -> Option<IpAddr> {
    match host(spelling)? {
        Host::Ipv4(address) => Some(address.into()),
        Host::Ipv6(address) => Some(address.into()),
        Host::Domain(_) => None,
    }
}

fn is_loopback(spelling: &str) -> bool {
    match host(spelling) {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).to_canonical().is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_sfu_are_equal() {
        let urls = [
            "wss://SFU.example.org",
            "https://sfu.example.org/",
            "WSS://sfu.example.org:443",
            "wss://sfu.example.org./",
        ];
        for url in urls {
            assert_eq!(url.parse::<SfuUrl>().unwrap().as_str(), "wss://sfu.example.org", "{url}");
        }
        assert_ne!("ws://sfu.example.org".parse::<SfuUrl>(), "wss://sfu.example.org".parse::<SfuUrl>());
        assert_eq!("ws://[::1]:7880/a/".parse::<SfuUrl>().unwrap().as_str(), "ws://[::1]:7880/a");
    }

    #[test]
    fn unusable_urls_are_named() {
        assert_eq!("nonsense".parse::<ServiceUrl>(), Err(FocusUrlError::Malformed));
        assert_eq!("https://".parse::<ServiceUrl>(), Err(FocusUrlError::Malformed));
        assert_eq!("ftp://x".parse::<ServiceUrl>(), Err(FocusUrlError::Scheme { wanted: "https" }));
        assert_eq!("https://u:p@x".parse::<ServiceUrl>(), Err(FocusUrlError::Credentials));
        assert_eq!(
            format!("https://{}", "x".repeat(2048)).parse::<ServiceUrl>(),
            Err(FocusUrlError::TooLong)
        );
        assert_eq!("https://x\n".parse::<SfuUrl>(), Err(FocusUrlError::Malformed));
        assert_eq!("wss://./a".parse::<SfuUrl>(), Err(FocusUrlError::Malformed));
    }

    #[test]
    fn loopback_hosts_are_recognised_in_every_notation() {
        let loopback = |url: &str| url.parse::<ServiceUrl>().unwrap().is_loopback();
        for url in [
            "http://localhost:8080",
            "http://LOCALHOST./",
            "http://a.localhost",
            "http://127.0.0.1",
            "http://127.9.9.9/a",
            "http://0x7f000001",
            "http://2130706433",
            "http://127.1",
            "http://[::1]:80",
            "http://[::ffff:127.0.0.1]",
        ] {
            assert!(loopback(url), "{url}");
        }
        for url in [
            "https://localhost.example.org",
            "http://10.0.0.1",
            "http://[fe80::1]",
            "http://127.0.0.1.nip.example",
        ] {
            assert!(!loopback(url), "{url}");
        }
    }

    #[test]
    fn foci_are_the_same_by_sfu_or_service() {
        let service: ServiceUrl = "https://jwt.example".parse().unwrap();
        let sfu: SfuUrl = "wss://sfu.example".parse().unwrap();
        let both = LiveKitFocus { service: Some(service.clone()), sfu: Some(sfu.clone()) };
        assert!(both.is_same_as(&LiveKitFocus::of_service(service)));
        assert!(both.is_same_as(&LiveKitFocus::of_sfu(sfu)));
        assert!(!both.is_same_as(&LiveKitFocus::of_service("https://other.example".parse().unwrap())));
    }
}
