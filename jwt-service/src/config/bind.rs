//! Where to listen.

use std::{fmt, path::PathBuf, str::FromStr};

/// Where to listen: `host:port`, `:port` for all interfaces, `[v6]:port`, or `unix:/path` for a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bind {
    /// TCP.
    Tcp {
        /// The host, without the brackets of IPv6; `None` is all interfaces.
        host: Option<String>,
        /// The port; 0 lets the system choose one.
        port: u16,
    },
    /// A Unix socket at this path.
    Unix(PathBuf),
}

impl Bind {
    /// Port `port` on all interfaces.
    pub fn everywhere(port: u16) -> Self {
        Self::Tcp { host: None, port }
    }

    /// Port `port` on loopback.
    pub fn loopback(port: u16) -> Self {
        Self::Tcp { host: Some("127.0.0.1".to_owned()), port }
    }
}

impl Default for Bind {
    /// All interfaces, port 8080.
    fn default() -> Self {
        Self::everywhere(8080)
    }
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text != text.trim() {
            return Err(format!("{text:?} has a blank at its beginning or end"));
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(format!("{text:?} has no absolute path after unix:"))
            };
        }
        if text.contains("://") {
            return Err(format!("{text:?} is a URL"));
        }
        if text.ends_with(']') {
            return Err(format!("{text:?} has no port after the bracket"));
        }
        let (host, port) =
            text.rsplit_once(':').ok_or_else(|| format!("{text:?} has no colon before the port"))?;
        let port = port.parse().map_err(|_| format!("{port:?} is not a port (0 to 65535)"))?;
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.strip_suffix(']').ok_or_else(|| format!("{text:?} lacks a closing bracket"))?,
            None if host.contains(':') => return Err(format!("{text:?} is IPv6 without brackets")),
            None => host,
        };
        if host.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '@' | ',' | '[' | ']')) {
            return Err(format!("{host:?} is no host"));
        }
        Ok(Self::Tcp { host: (!host.is_empty()).then(|| host.to_owned()), port })
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host: Some(host), port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host: Some(host), port } => write!(f, "{host}:{port}"),
            Self::Tcp { host: None, port } => write!(f, ":{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_read_is_printed_the_same(text in "(\\[[0-9a-f:]{0,8}\\]|[a-z0-9.]{0,8}|unix):?/?.{0,6}") {
            if let Ok(bind) = text.parse::<Bind>() {
                prop_assert_eq!(bind.to_string().parse::<Bind>(), Ok(bind));
            }
        }
    }
}
