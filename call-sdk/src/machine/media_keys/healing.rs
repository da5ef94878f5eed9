//! Heals pairs of members that cannot decrypt each other, without a storm of messages.
//!
//! No generation of clients has a message that asks for a key, and deployed clients send a key once and never retry.
//! Two symptoms are treated, each after [`HealingConfig::patience`]:
//!
//! - We have no key of a member; or it joined again, publishes, and neither a key nor an authenticated frame of it came
//!   since. We send it our key again and, if it publishes and that did not help, renew our membership.
//! - We have its key, it publishes, and none of its frames authenticates. We send it our key again.
//!
//! A client of this kind that gets a key again answers with its own ([`super::inbox`], [`super::rollout`]). Deployed
//! clients send their key again to a member whose membership has a new creation time. That costs a message from every
//! member, so it is spaced out over the whole call, not per member, and only done for members whose media arrives: a
//! membership left behind by a crashed client has none.
//!
//! The only evidence is the absence of authenticated frames. What unauthenticated bytes say is never considered, so an
//! SFU can trigger no more than the limits here allow. A member that our policy refuses is left alone.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use ruma_common::UserId;

use super::{doubled, later, presence::Changes};
use crate::{
    member::{Device, MemberKey},
    time::UnixMillis,
};

/// When to ask for missing keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealingConfig {
    /// How long a symptom must last before the first remedy, and a remedy before the next: 10 s.
    pub patience: Duration,
    /// Longest wait between two remedies for one member: 1 h. It starts at `patience` and doubles.
    pub max_wait: Duration,
    /// Least time between two renewals of our membership: 60 s. It doubles with each.
    pub renewal_base: Duration,
    /// Longest time between two renewals: 1 h.
    pub renewal_max: Duration,
    /// Whether our membership may be renewed: yes. Set it to `false` in calls that choose the focus of the oldest
    /// member, where the order of memberships matters.
    pub renew_membership: bool,
}

impl Default for HealingConfig {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(10),
            max_wait: Duration::from_secs(3600),
            renewal_base: Duration::from_secs(60),
            renewal_max: Duration::from_secs(3600),
            renew_membership: true,
        }
    }
}

/// What to do about a pair that cannot decrypt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Send our current key to this device again.
    SendKey(Device),
    /// Publish our membership again with a new creation time.
    RenewMembership,
}

/// The state machine of healing. See the [module](self).
#[derive(Debug)]
pub(super) struct Healing {
    config: HealingConfig,
    joined_at: Option<Instant>,
    peers: BTreeMap<MemberKey, Peer>,
    renewed_at: Option<Instant>,
    renewals: u32,
    /// Something changed since the last call of [`Self::poll`].
    changed: bool,
    next: Option<Instant>,
}

impl Healing {
    /// Nothing is done before [`Self::join`].
    #[must_use]
    pub(super) fn new(config: HealingConfig) -> Self {
        Self {
            config,
            joined_at: None,
            peers: BTreeMap::new(),
            renewed_at: None,
            renewals: 0,
            changed: false,
            next: None,
        }
    }

    /// We joined the call: symptoms count from now.
    pub(super) fn join(&mut self, now: Instant) {
        self.joined_at = Some(now);
        self.changed = true;
        self.peers.values_mut().for_each(|peer| peer.treatment = None);
    }

    /// We left the call.
    pub(super) fn leave(&mut self) {
        self.joined_at = None;
        self.changed = true;
        self.peers.clear();
    }

    /// Takes the changes among the members. Members without a known device are passed over, as they cannot be sent a
    /// key.
    pub(super) fn members(&mut self, now: Instant, changes: &Changes<'_>) {
        self.changed = true;
        for member in &changes.left {
            self.peers.remove(member);
        }
        for member in &changes.joined {
            if let Some(device) = member.device() {
                self.peers.insert(member.key(), Peer::new(device, member.created, now));
            }
        }
        for member in &changes.changed {
            if let Some(peer) = self.peers.get_mut(&member.key())
                && peer.created != member.created
            {
                peer.created = member.created;
                peer.rejoined_at = Some(now);
                peer.treatment = None;
            }
        }
    }

    /// We got a key of this member, `new` or one that we had.
    pub(super) fn keyed(&mut self, now: Instant, member: &MemberKey, new: bool) {
        if let Some(peer) = self.peers.get_mut(member) {
            self.changed = true;
            peer.confirmed_at = Some(now);
            if new {
                peer.keyed_at = Some(now);
            }
        }
    }

    /// What arrives of this member's media: whether it publishes a track that is not muted and that we receive, and
    /// when a frame of it was last authenticated.
    pub(super) fn media(
        &mut self,
        now: Instant,
        member: &MemberKey,
        publishing: bool,
        last_authenticated: Option<Instant>,
    ) {
        if let Some(peer) = self.peers.get_mut(member) {
            // A later frame only postpones what is planned for a healthy peer.
            self.changed |= publishing != peer.publishing_since.is_some() || peer.treatment.is_some();
            peer.publishing_since = publishing.then(|| peer.publishing_since.unwrap_or(now));
            peer.last_authenticated = peer.last_authenticated.max(last_authenticated);
        }
    }

    /// Policy may have changed its mind about a device.
    pub(super) fn policy_changed(&mut self) {
        self.changed = true;
    }

    /// Trust in this user's devices may have changed: wait for what comes of that.
    pub(super) fn trust_changed(&mut self, now: Instant, user: &UserId) {
        self.changed = true;
        for (_, peer) in self.peers.iter_mut().filter(|(member, _)| member.user_id == user) {
            peer.since = now;
            peer.treatment = None;
        }
    }

    /// The remedies that are due. `refused`: whether policy keeps us from sharing keys with a device.
    pub(super) fn poll(&mut self, now: Instant, refused: impl Fn(&Device) -> bool) -> Vec<Remedy> {
        if !std::mem::take(&mut self.changed) && self.next.is_none_or(|next| now < next) {
            return Vec::new();
        }
        self.next = None;
        let Some(joined_at) = self.joined_at else { return Vec::new() };
        let mut remedies = Vec::new();
        // When a renewal is wanted first.
        let mut renew_at: Option<Instant> = None;
        let mut next: Option<Instant> = None;
        for peer in self.peers.values_mut() {
            let Some(symptom) = peer.symptom(joined_at) else {
                peer.treatment = None;
                continue;
            };
            let treated_from = later(symptom.since, self.config.patience);
            if now < treated_from {
                peer.treatment = None;
                next = earliest(next, treated_from);
                continue;
            }
            if refused(&peer.device) {
                peer.treatment = None;
                continue;
            }
            let renewable = later(now, self.config.patience);
            let treatment = peer.treatment.get_or_insert(Treatment { sent: 0, next: now, renewable });
            if now >= treatment.next {
                remedies.push(Remedy::SendKey(peer.device.clone()));
                treatment.sent = treatment.sent.saturating_add(1);
                treatment.next =
                    later(now, doubled(self.config.patience, treatment.sent, self.config.max_wait));
            }
            next = earliest(next, treatment.next);
            if symptom.renewal_helps && self.config.renew_membership {
                renew_at = earliest(renew_at, treatment.renewable);
            }
        }
        if let Some(wanted_at) = renew_at {
            let mut at = self.renewal_allowed_at().map_or(wanted_at, |allowed| allowed.max(wanted_at));
            if now >= at {
                remedies.push(Remedy::RenewMembership);
                self.renewed(now);
                at = later(now, self.renewal_wait());
            }
            next = earliest(next, at);
        }
        self.next = next;
        remedies
    }

    /// When [`Self::poll`] has something to do next, if nothing changes; as of its last call.
    #[must_use]
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }

    fn renewed(&mut self, now: Instant) {
        // A need long after the last renewal is a new one; needs whenever a renewal is allowed may be provoked.
        let over = self.renewal_wait().saturating_mul(2);
        let is_new = self.renewed_at.is_none_or(|at| now.saturating_duration_since(at) >= over);
        self.renewals = if is_new { 1 } else { self.renewals.saturating_add(1) };
        self.renewed_at = Some(now);
    }

    fn renewal_allowed_at(&self) -> Option<Instant> {
        self.renewed_at.map(|at| later(at, self.renewal_wait()))
    }

    fn renewal_wait(&self) -> Duration {
        doubled(self.config.renewal_base, self.renewals.saturating_sub(1), self.config.renewal_max)
    }
}

/// A member on another device.
#[derive(Debug)]
struct Peer {
    device: Device,
    created: UnixMillis,
    /// When we first saw it, or its trust changed.
    since: Instant,
    /// When it joined again.
    rejoined_at: Option<Instant>,
    /// When its newest key was installed; `None` without a key.
    keyed_at: Option<Instant>,
    /// When it last sent a key, new or not.
    confirmed_at: Option<Instant>,
    publishing_since: Option<Instant>,
    last_authenticated: Option<Instant>,
    treatment: Option<Treatment>,
}

#[derive(Debug)]
struct Symptom {
    since: Instant,
    renewal_helps: bool,
}

/// What was done about a symptom.
#[derive(Debug)]
struct Treatment {
    /// How often our key was sent again.
    sent: u32,
    /// When it is sent next.
    next: Instant,
    /// When the first sending had its time.
    renewable: Instant,
}

impl Peer {
    fn new(device: Device, created: UnixMillis, now: Instant) -> Self {
        Self {
            device,
            created,
            since: now,
            rejoined_at: None,
            keyed_at: None,
            confirmed_at: None,
            publishing_since: None,
            last_authenticated: None,
            treatment: None,
        }
    }

    fn symptom(&self, joined_at: Instant) -> Option<Symptom> {
        let start = self.since.max(joined_at);
        let Some(keyed_at) = self.keyed_at else {
            return Some(Symptom { since: start, renewal_helps: self.publishing_since.is_some() });
        };
        let publishing_since = self.publishing_since?;
        // The key from before a rejoin may be the old one, unless something was heard of it since.
        let heard = self.confirmed_at.max(self.last_authenticated);
        let renewal_helps = self.rejoined_at.is_some_and(|at| heard.is_none_or(|heard| heard < at));
        let since = start.max(keyed_at).max(publishing_since);
        let since =
            since.max(self.rejoined_at.unwrap_or(since)).max(self.last_authenticated.unwrap_or(since));
        Some(Symptom { since, renewal_helps })
    }
}

fn earliest(one: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(one.map_or(other, |one| one.min(other)))
}

#[cfg(test)]
mod tests;
