//! Matrix server names: an IP literal or a DNS name, and perhaps a port.

use std::{fmt, net::IpAddr, str::FromStr};

/// The longest name the Matrix specification allows for a DNS name (RFC 1035), port excluded.
const MAX_HOST: usize = 253;
/// The longest port of the grammar.
const MAX_PORT_DIGITS: usize = 5;

/// A server name that follows the grammar of the Matrix specification (appendices §Server Name), as it was
/// written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerName {
    text: String,
    host: Host,
    port: Option<u16>,
}

/// The host part of a server name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An IP address written out; `[…]` for IPv6.
    Ip(IpAddr),
    /// A name to look up.
    Dns(String),
}

impl ServerName {
    /// The name as it was written: what goes into the `Host` header.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name without its port.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port, if one is written.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Whether the name itself says that the server is on this machine: `localhost`, a name below it, or a
    /// loopback address.
    pub fn is_loopback(&self) -> bool {
        match &self.host {
            Host::Ip(ip) => ip.is_loopback(),
            Host::Dns(name) => {
                let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
                name == "localhost" || name.ends_with(".localhost")
            }
        }
    }
}

impl FromStr for ServerName {
    type Err = InvalidServerName;

    fn from_str(text: &str) -> Result<Self, InvalidServerName> {
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
                // With any number of zeros one server would have any number of names, each with limits of its
                // own.
                if port.len() > MAX_PORT_DIGITS {
                    return Err(InvalidServerName);
                }
                // The last group of a bracketed IPv6 address is not a port: the bracket follows it.
                (host, Some(port.parse().map_err(|_| InvalidServerName)?))
            }
            _ => (text, None),
        };
        let host = if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Host::Ip(IpAddr::V6(v6.parse().map_err(|_| InvalidServerName)?))
        } else if let Ok(v4) = host.parse() {
            Host::Ip(IpAddr::V4(v4))
        } else {
            let valid = !host.is_empty()
                && host.len() <= MAX_HOST
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
            if !valid {
                return Err(InvalidServerName);
            }
            Host::Dns(host.to_owned())
        };
        Ok(Self { text: text.to_owned(), host, port })
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(IpAddr::V4(ip)) => ip.fmt(f),
            Self::Dns(name) => f.write_str(name),
        }
    }
}

/// The text is no Matrix server name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a Matrix server name; write a DNS name or an IP address (IPv6 in brackets), optionally with :port"
)]
pub struct InvalidServerName;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> (String, Option<u16>) {
        let name: ServerName = text.parse().unwrap();
        assert_eq!(name.as_str(), text);
        (name.host().to_string(), name.port())
    }

    #[test]
    fn names_split_into_host_and_port() {
        assert_eq!(parsed("example.com"), ("example.com".into(), None));
        assert_eq!(parsed("example.com:8448"), ("example.com".into(), Some(8448)));
        assert_eq!(parsed("localhost:0"), ("localhost".into(), Some(0)));
        assert_eq!(parsed("1.2.3.4"), ("1.2.3.4".into(), None));
        assert_eq!(parsed("1.2.3.4:443"), ("1.2.3.4".into(), Some(443)));
        assert_eq!(parsed("[2001:db8::1]"), ("[2001:db8::1]".into(), None));
        assert_eq!(parsed("[::1]:8448"), ("[::1]".into(), Some(8448)));
        assert_eq!(parsed("Matrix-1.Example.COM"), ("Matrix-1.Example.COM".into(), None));
    }

    #[test]
    fn everything_else_is_refused() {
        for bad in [
            "",
            ":",
            ":8448",
            "a b",
            "a_b",
            "ex.com:",
            "ex.com:65536",
            "ex.com:000443",
            "ex.com:99999999999",
            "ex.com:-1",
            "ex.com:+1",
            "::1",
            "[::1",
            "::1]",
            "[1.2.3.4]",
            "[::1%eth0]",
            "ex.com/path",
            "user@ex.com",
            "ex.com:80:80",
            "ü.de",
            "ex.com#",
            "ex.com?x",
            "ex\r\nHost: y",
        ] {
            assert_eq!(bad.parse::<ServerName>(), Err(InvalidServerName), "{bad:?}");
        }
        assert!("a".repeat(254).parse::<ServerName>().is_err());
    }

    #[test]
    fn loopback_is_known_by_name() {
        for yes in [
            "localhost",
            "LOCALHOST:1",
            "a.localhost",
            "localhost.",
            "127.0.0.1:8448",
            "127.9.9.9",
            "[::1]:1",
        ] {
            assert!(yes.parse::<ServerName>().unwrap().is_loopback(), "{yes}");
        }
        for no in ["notlocalhost", "localhost.example.com", "128.0.0.1", "[::2]", "127.0.0.1.nip.io"] {
            assert!(!no.parse::<ServerName>().unwrap().is_loopback(), "{no}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_keeps_the_text(text in ".*") {
            if let Ok(name) = text.parse::<ServerName>() {
                prop_assert_eq!(name.as_str(), &text);
            }
        }

        #[test]
        fn a_valid_name_is_a_valid_authority(text in "[a-zA-Z0-9.\\-\\[\\]:]{1,40}") {
            if let Ok(name) = text.parse::<ServerName>() {
                prop_assert!(name.as_str().parse::<hyper::http::uri::Authority>().is_ok());
            }
        }
    }
}
