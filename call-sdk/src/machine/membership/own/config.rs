//! Settings of our membership.

use std::time::Duration;

use super::super::wire::DEFAULT_EXPIRES;

/// Settings of our membership. The defaults follow Element Call where it has the setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnConfig {
    /// How long after its last restart the homeserver sends our delayed leave: 18 s, or what the homeserver allows.
    pub leave_delay: Duration,
    /// How often the delayed leave is restarted: 4 s, but at most two thirds of its delay.
    pub restart_interval: Duration,
    /// Timeout of one restart: 2 s.
    pub restart_timeout: Duration,
    /// Delay of a delayed leave that the focus's service keeps alive: 1 h, or what the homeserver allows.
    pub delegated_delay: Duration,
    /// How often we restart that one ourselves, to notice its loss: 5 min.
    pub delegated_restart_interval: Duration,
    /// Wait after a network error or 5xx: 1 s. Constant while joining; once joined it doubles with every failure.
    pub network_retry: Duration,
    /// Longest such wait once joined: 10 s.
    pub max_backoff: Duration,
    /// Wait after a 429 without `Retry-After`: 5 s.
    pub rate_limit_default: Duration,
    /// How long past now a state membership with a delayed leave is published for, at least: 4 h.
    pub expires: Duration,
    /// How long before a refresh interval of the state form ends the membership is refreshed: 5 s.
    pub expires_headroom: Duration,
    /// How long a membership without a delayed leave is published for: 10 min. It is refreshed twice in that time. A
    /// device that vanishes stays listed this long. The sticky form uses at least 5 min (MSC4354).
    pub undelayed_expires: Duration,
    /// Timeout of any other request: 10 s.
    pub request_timeout: Duration,
    /// How long a first join may take: 30 s. Network errors are retried meanwhile.
    pub join_timeout: Duration,
    /// How long a first join may take if the homeserver asks us to wait (429): 2 min.
    pub rate_limit_patience: Duration,
    /// How long leaving may take in all: 5 s. After that the delayed leave ends the membership.
    pub leave_timeout: Duration,
    /// How long after publishing a sync without our membership counts as a late sync: 5 s. It doubles with every
    /// rejoin that no sync shows.
    pub missing_grace: Duration,
    /// How long joining waits for a sync to show our sticky event: 3 s.
    pub echo_timeout: Duration,
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
            max_backoff: Duration::from_secs(10),
            rate_limit_default: Duration::from_secs(5),
            expires: DEFAULT_EXPIRES,
            expires_headroom: Duration::from_secs(5),
            undelayed_expires: Duration::from_mins(10),
            request_timeout: Duration::from_secs(10),
            join_timeout: Duration::from_secs(30),
            rate_limit_patience: Duration::from_mins(2),
            leave_timeout: Duration::from_secs(5),
            missing_grace: Duration::from_secs(5),
            echo_timeout: Duration::from_secs(3),
        }
    }
}
