//! Where media goes: discovery of foci, and the tokens that their authorisation services give.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::{
    matrix::{MatrixError, MatrixPort, OpenIdToken},
    member::LiveKitFocus,
};

/// Longest answer of an authorisation service that is read, in bytes.
const MAX_REPLY: usize = 64 * 1024;
/// An authorisation service verifies with the homeserver before it answers; its own budget is 30 s.
const REPLY_TIMEOUT: Duration = Duration::from_secs(35);

/// What opens an SFU room: where it is and the token for it.
#[derive(Clone, Deserialize)]
pub struct SfuAccess {
    /// `ws:` or `wss:` URL of the SFU.
    pub url: String,
    /// The token; redacted in `Debug`.
    pub jwt: String,
}

impl std::fmt::Debug for SfuAccess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SfuAccess").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A delayed leave (MSC4140) as its homeserver holds it.
#[derive(Clone)]
pub struct DelayedLeave {
    /// Its handle, a capability: redacted in `Debug`.
    pub delay_id: String,
    /// How long after its last restart it is sent.
    pub delay: Duration,
}

impl std::fmt::Debug for DelayedLeave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DelayedLeave").field("delay", &self.delay).finish_non_exhaustive()
    }
}

/// Asks authorisation services for SFU access.
#[derive(Clone, Debug)]
pub struct TokenClient {
    http: reqwest::Client,
}

impl TokenClient {
    /// A client with bounded time and size. It follows no redirects: an OpenID token goes to nobody else.
    ///
    /// # Errors
    /// [`FocusError::Http`] if the TLS stack cannot start.
    pub fn new() -> Result<Self, FocusError> {
        let http = reqwest::Client::builder()
            .timeout(REPLY_TIMEOUT)
            .connect_timeout(Duration::from_secs(5))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("antiphon-call-sdk/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| FocusError::Http { service: String::new(), source })?;
        Ok(Self { http })
    }

    /// Gets access by `POST {service}/sfu/get`, the endpoint of compatibility mode (identity `user:device`).
    ///
    /// # Errors
    /// [`FocusError`], naming the service and what it answered.
    pub async fn sfu_get(
        &self,
        focus: &LiveKitFocus,
        port: &dyn MatrixPort,
    ) -> Result<SfuAccess, FocusError> {
        self.exchange(focus, port, None).await
    }

    /// Asks the service to keep a delayed leave of this device alive while the device is on the SFU, and to have it
    /// sent when the device is gone (MSC4195 §Delegation of Delayed Leave). In compatibility mode that is another
    /// exchange at `sfu/get`, for the same identity; the access that comes with it is not needed.
    ///
    /// # Errors
    /// [`FocusError::Refused`] with 400 from services that do not do this, or not for users of this homeserver.
    pub async fn delegate_leave(
        &self,
        focus: &LiveKitFocus,
        port: &dyn MatrixPort,
        leave: &DelayedLeave,
    ) -> Result<(), FocusError> {
        self.exchange(focus, port, Some(leave)).await.map(drop)
    }

    async fn exchange(
        &self,
        focus: &LiveKitFocus,
        port: &dyn MatrixPort,
        leave: Option<&DelayedLeave>,
    ) -> Result<SfuAccess, FocusError> {
        #[derive(Serialize)]
        struct Body<'a> {
            room: &'a str,
            openid_token: &'a OpenIdToken,
            device_id: &'a str,
            // Services may refuse members that they do not know, so these come only when they are meant.
            #[serde(skip_serializing_if = "Option::is_none")]
            delay_id: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            delay_timeout: Option<u64>,
        }
        let openid_token = port.openid_token().await?;
        let body = Body {
            room: port.room_id().as_str(),
            openid_token: &openid_token,
            device_id: port.device_id().as_str(),
            delay_id: leave.map(|leave| leave.delay_id.as_str()),
            delay_timeout: leave.map(|leave| u64::try_from(leave.delay.as_millis()).unwrap_or(u64::MAX)),
        };
        let service = focus.service_url.trim_end_matches('/').to_owned();
        let failed = |source| FocusError::Http { service: service.clone(), source };
        let mut reply =
            self.http.post(format!("{service}/sfu/get")).json(&body).send().await.map_err(failed)?;
        let status = reply.status();
        let mut bytes = Vec::new();
        while let Some(chunk) = reply.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > MAX_REPLY {
                return Err(FocusError::Malformed {
                    service,
                    reason: "its answer is longer than 64 KiB".into(),
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            return Err(FocusError::refused(service, status.as_u16(), &bytes));
        }
        let access: SfuAccess = serde_json::from_slice(&bytes)
            .map_err(|e| FocusError::Malformed { service: service.clone(), reason: e.to_string() })?;
        match Url::parse(&access.url) {
            Ok(url) if matches!(url.scheme(), "ws" | "wss" | "http" | "https") => Ok(access),
            _ => Err(FocusError::Malformed { service, reason: "it names no usable SFU URL".into() }),
        }
    }
}

/// The focus that this device publishes to: the given one, else the homeserver's first.
///
/// # Errors
/// [`FocusError::NoFocus`] if the homeserver offers none.
pub async fn choose(
    configured: Option<LiveKitFocus>,
    port: &dyn MatrixPort,
) -> Result<LiveKitFocus, FocusError> {
    if let Some(focus) = configured {
        return Ok(focus);
    }
    let offered = port.livekit_foci().await?;
    offered
        .into_iter()
        .next()
        .ok_or_else(|| FocusError::NoFocus { server: port.user_id().server_name().to_string() })
}

/// Why no focus can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FocusError {
    /// The homeserver names no LiveKit focus.
    #[error(
        "the homeserver {server} offers no LiveKit focus; its operator must list one under matrix_rtc.transports, or pass one in CallOptions::focus"
    )]
    NoFocus {
        /// The user's homeserver.
        server: String,
    },
    /// The homeserver failed.
    #[error(transparent)]
    Matrix(#[from] MatrixError),
    /// The authorisation service cannot be reached.
    #[error("the authorisation service {service} cannot be reached")]
    Http {
        /// Its base URL.
        service: String,
        /// What went wrong on the way.
        #[source]
        source: reqwest::Error,
    },
    /// The authorisation service said no.
    #[error("the authorisation service {service} refused ({status} {errcode}): {message}")]
    Refused {
        /// Its base URL.
        service: String,
        /// HTTP status.
        status: u16,
        /// Matrix error code, empty if it gave none.
        errcode: String,
        /// Its own words.
        message: String,
    },
    /// This way to connect knows no service that delayed leaves can be delegated to.
    #[error("delayed leaves cannot be delegated here")]
    NoDelegation,
    /// The authorisation service answered nonsense.
    #[error("the authorisation service {service} gave an unusable answer: {reason}")]
    Malformed {
        /// Its base URL.
        service: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl FocusError {
    fn refused(service: String, status: u16, body: &[u8]) -> Self {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Body {
            errcode: String,
            error: String,
        }
        let Body { errcode, error } = serde_json::from_slice(body).unwrap_or_default();
        Self::Refused { service, status, errcode, message: error }
    }
}
