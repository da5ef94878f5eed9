//! The figures of our membership.

use std::time::Duration;

/// The figures of our membership. The default is what Element Call uses today.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnConfig {
    /// How long after its last restart the homeserver sends our leave: 18 s.
    pub leave_delay: Duration,
    /// How often the delayed leave is restarted: 4 s, but at most two thirds of the delay.
    pub restart_interval: Duration,
    /// How long one restart may take: 2 s.
    pub restart_timeout: Duration,
    /// The same for a delayed leave that the focus keeps for us: 1 h, or what the homeserver allows.
    pub delegated_delay: Duration,
    /// How often that one is restarted: 5 min.
    pub delegated_restart_interval: Duration,
    /// Wait after a network error or 5xx: 1 s.
    pub network_retry: Duration,
    /// Network errors in a row, per kind of request, that are retried before the membership is given up: 11.
    pub network_retries: u32,
    /// 429 answers in a row, per kind of request, that are retried: 10.
    pub rate_limit_retries: u32,
    /// Wait after a 429 that names none: 5 s.
    pub rate_limit_default: Duration,
    /// How long past now a membership is published for, at least: 4 h.
    pub expires: Duration,
    /// How long before the interval is over the membership is refreshed: 5 s.
    pub expires_headroom: Duration,
    /// How long any other request may take: 10 s.
    pub request_timeout: Duration,
    /// How long leaving may take in all: 5 s. After that the delayed leave does it.
    pub leave_timeout: Duration,
    /// How long after publishing a sync without our membership is taken for a late sync: 5 s. It doubles with
    /// every rejoin that is not seen either.
    pub missing_grace: Duration,
}

impl OwnConfig {
    /// What matrix-js-sdk uses when an application sets nothing.
    #[must_use]
    pub fn js_sdk_defaults() -> Self {
        Self {
            leave_delay: Duration::from_secs(8),
            restart_interval: Duration::from_secs(5),
            network_retry: Duration::from_secs(3),
            network_retries: 10,
            missing_grace: Duration::ZERO,
            ..Self::default()
        }
    }
}

impl Default for OwnConfig {
    fn default() -> Self {
        Self {
            leave_delay: Duration::from_secs(18),
            restart_interval: Duration::from_secs(4),
            restart_timeout: Duration::from_secs(2),
            delegated_delay: Duration::from_hours(1),
            delegated_restart_interval: Duration::from_mins(5),
            network_retry: Duration::from_secs(1),
            network_retries: 11,
            rate_limit_retries: 10,
            rate_limit_default: Duration::from_secs(5),
            expires: super::super::wire::DEFAULT_EXPIRES,
            expires_headroom: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            leave_timeout: Duration::from_secs(5),
            missing_grace: Duration::from_secs(5),
        }
    }
}
