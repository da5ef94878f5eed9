//! STUN and TURN servers.

use std::fmt;

/// A STUN or TURN server.
#[derive(Clone, PartialEq, Eq)]
pub struct IceServer {
    /// `stun:` and `turn:` URLs. TURN over TCP or TLS is not supported by the engine; such URLs are left out.
    pub urls: Vec<String>,
    /// TURN user name; empty for STUN.
    pub username: String,
    /// TURN password; empty for STUN.
    pub credential: String,
}

impl IceServer {
    /// The servers without URLs that the engine cannot use, and without servers that have no other.
    pub(in crate::transport) fn usable(servers: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut left_out = Vec::new();
        let usable = servers
            .into_iter()
            .filter_map(|server| {
                let (urls, others): (Vec<_>, Vec<_>) =
                    server.urls.into_iter().partition(|url| is_over_udp(url));
                left_out.extend(others);
                (!urls.is_empty()).then_some(Self { urls, ..server })
            })
            .collect();
        if !left_out.is_empty() {
            tracing::info!(
                ?left_out,
                "only STUN and TURN over UDP are supported; other ICE servers are left out"
            );
        }
        usable
    }
}

fn is_over_udp(url: &str) -> bool {
    (url.starts_with("stun:") || url.starts_with("turn:"))
        && !url.to_ascii_lowercase().contains("transport=tcp")
}

impl fmt::Debug for IceServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IceServer")
            .field("urls", &self.urls)
            .field("username", &self.username)
            .field("credential", &"redacted")
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(urls: &[&str]) -> IceServer {
        IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: "u".into(),
            credential: "verysecret".into(),
        }
    }

    #[test]
    fn only_servers_over_udp_are_usable() {
        let servers = [
            server(&["stun:a", "turns:b:443?transport=tcp", "turn:c?transport=TCP", "turn:d"]),
            server(&["turns:b:443"]),
        ];
        assert_eq!(IceServer::usable(servers), [server(&["stun:a", "turn:d"])]);
    }

    #[test]
    fn credential_does_not_print() {
        assert!(!format!("{:?}", server(&["turn:x"])).contains("verysecret"));
    }
}
