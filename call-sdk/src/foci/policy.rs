//! Which authorisation services get an OpenID token of ours.
//!
//! An OpenID token proves to its holder who we are, and any service that holds it can use it at another one for as
//! long as it is valid. Members of a call name the services, so every one of them could collect such tokens, or make
//! this machine send requests into its own network. This file decides; `access.rs` enforces it at the socket.

use std::collections::BTreeSet;

use ruma_common::{OwnedServerName, ServerName};

use crate::{
    addresses::AddressRule,
    transport::{NamedBy, ServiceUrl, SfuUrl},
};

/// Which services get an OpenID token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePolicy {
    /// How many different services that members name get one, per call. Services of the application and of our own
    /// homeserver do not count.
    pub max_services: usize,
    /// Where services and SFUs that members name may be.
    pub addresses: AddressRule,
}

impl ServicePolicy {
    /// For programs in a server network (bots, bridges): members cannot make them connect to private addresses.
    #[must_use]
    pub fn public_only() -> Self {
        Self { addresses: AddressRule::PublicOnly, ..Self::default() }
    }

    /// The addresses that may be connected to for something that `named_by` named.
    #[must_use]
    pub fn addresses_for(&self, named_by: &NamedBy) -> AddressRule {
        match named_by {
            NamedBy::Application | NamedBy::Homeserver => AddressRule::Any,
            NamedBy::Members(_) => self.addresses,
        }
    }

    /// Checks the SFU that a token is for.
    ///
    /// # Errors
    /// [`PolicyRefusal`] if it is at an address that `named_by` may not make us connect to.
    pub fn check_sfu(&self, sfu: &SfuUrl, named_by: &NamedBy) -> Result<(), PolicyRefusal> {
        if self.addresses_for(named_by).permits_host(sfu.address(), sfu.is_loopback()) {
            return Ok(());
        }
        Err(PolicyRefusal {
            url: sfu.to_string(),
            named_by: named_by.clone(),
            reason: RefusalReason::PrivateAddress,
        })
    }
}

impl Default for ServicePolicy {
    /// At most 8 services that members name, at any address.
    fn default() -> Self {
        Self { max_services: 8, addresses: AddressRule::Any }
    }
}

/// The services that members named and that got a token in this call.
#[derive(Debug, Default)]
pub(super) struct Admitted(BTreeSet<ServiceUrl>);

impl Admitted {
    /// Decides whether `service` gets an OpenID token, and remembers that it did.
    ///
    /// # Errors
    /// [`PolicyRefusal`]; nothing may be sent to the service then.
    pub(super) fn admit(
        &mut self,
        policy: &ServicePolicy,
        service: &ServiceUrl,
        named_by: &NamedBy,
    ) -> Result<(), PolicyRefusal> {
        let refuse =
            |reason| Err(PolicyRefusal { url: service.to_string(), named_by: named_by.clone(), reason });
        if !service.is_encrypted() && !service.is_loopback() {
            return refuse(RefusalReason::NotEncrypted);
        }
        if !policy.addresses_for(named_by).permits_host(service.address(), service.is_loopback()) {
            return refuse(RefusalReason::PrivateAddress);
        }
        if let NamedBy::Members(users) = named_by {
            if users.is_empty() {
                return refuse(RefusalReason::NotNamed);
            }
            if self.0.len() >= policy.max_services && !self.0.contains(service) {
                return refuse(RefusalReason::TooMany { limit: policy.max_services });
            }
            self.0.insert(service.clone());
        }
        Ok(())
    }
}

/// Homeservers that may issue tokens for an SFU, in the order of asking; `None` is our own. A member may publish to the
/// SFU of another server than its own (MSC4195), so ours comes last.
pub(super) fn token_servers(named_by: &NamedBy, own: &ServerName) -> Vec<Option<OwnedServerName>> {
    /// Each costs a request, and members choose them.
    const MAX_FOREIGN: usize = 4;
    let mut servers: Vec<Option<OwnedServerName>> = Vec::new();
    if let NamedBy::Members(users) = named_by {
        for server in users.iter().map(|user| user.server_name()).filter(|server| *server != own) {
            if servers.len() < MAX_FOREIGN && !servers.iter().any(|s| s.as_deref() == Some(server)) {
                servers.push(Some(server.to_owned()));
            }
        }
    }
    servers.push(None);
    servers
}

/// A service or SFU that our policy keeps us from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused to use {url}, named by {named_by}: {reason}")]
pub struct PolicyRefusal {
    /// The URL.
    pub url: String,
    /// Where we have it from.
    pub named_by: NamedBy,
    /// What is wrong with it.
    pub reason: RefusalReason,
}

/// Why a service gets no OpenID token, or an SFU no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// `http` to another machine: everyone on the way could take the token.
    #[error("it is not https, so others could read our OpenID token; its operator must serve it over https")]
    NotEncrypted,
    /// An address that the Internet cannot reach, under [`AddressRule::PublicOnly`].
    #[error(
        "it is at a private address, and this program connects only to public ones (ServicePolicy::addresses)"
    )]
    PrivateAddress,
    /// One more than [`ServicePolicy::max_services`].
    #[error("members of this call name more than {limit} services (ServicePolicy::max_services)")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The caller could not say which member names it.
    #[error("no joined member names it")]
    NotNamed,
}

#[cfg(test)]
mod tests {
    use ruma_common::{OwnedUserId, owned_user_id, server_name};

    use super::*;

    fn members(users: &[&str]) -> NamedBy {
        NamedBy::Members(users.iter().map(|user| OwnedUserId::try_from(*user).unwrap()).collect())
    }

    fn admit(policy: ServicePolicy, url: &str, named_by: &NamedBy) -> Result<(), RefusalReason> {
        Admitted::default().admit(&policy, &url.parse().unwrap(), named_by).map_err(|refusal| refusal.reason)
    }

    #[test]
    fn plain_http_is_refused_except_on_loopback() {
        let open = ServicePolicy::default();
        for named_by in [NamedBy::Application, NamedBy::Homeserver, members(&["@m:evil.example"])] {
            assert_eq!(admit(open, "http://jwt.example", &named_by), Err(RefusalReason::NotEncrypted));
            assert_eq!(admit(open, "http://10.0.0.1:8080", &named_by), Err(RefusalReason::NotEncrypted));
            assert_eq!(admit(open, "https://jwt.example", &named_by), Ok(()));
            assert_eq!(admit(open, "http://127.0.0.1:8080", &named_by), Ok(()));
        }
    }

    #[test]
    fn public_only_policy_refuses_private_hosts_of_members() {
        let policy = ServicePolicy::public_only();
        let mallory = members(&["@m:evil.example"]);
        for url in [
            "https://10.0.0.1",
            "https://127.0.0.1",
            "http://localhost",
            "https://a.localhost",
            "https://[fd00::1]",
            "https://169.254.169.254",
            "https://0xa000001",
            "https://[::ffff:192.168.0.1]",
        ] {
            assert_eq!(admit(policy, url, &mallory), Err(RefusalReason::PrivateAddress), "{url}");
            let sfu = url.parse().unwrap();
            assert_eq!(
                policy.check_sfu(&sfu, &mallory).unwrap_err().reason,
                RefusalReason::PrivateAddress,
                "{url}"
            );
            assert_eq!(policy.check_sfu(&sfu, &NamedBy::Homeserver), Ok(()));
        }
        assert_eq!(admit(policy, "https://1.1.1.1", &mallory), Ok(()));
        assert_eq!(admit(policy, "https://jwt.example", &mallory), Ok(()));
        assert_eq!(admit(policy, "https://10.0.0.1", &NamedBy::Homeserver), Ok(()));
    }

    #[test]
    fn members_name_only_so_many_services() {
        let policy = ServicePolicy { max_services: 2, ..ServicePolicy::default() };
        let mut admitted = Admitted::default();
        let mallory = members(&["@m:evil.example"]);
        let mut admit = |url: &str, by: &NamedBy| {
            admitted.admit(&policy, &url.parse().unwrap(), by).map_err(|r| r.reason)
        };
        assert_eq!(admit("https://a.example", &mallory), Ok(()));
        assert_eq!(admit("https://b.example", &mallory), Ok(()));
        assert_eq!(admit("https://A.example/", &mallory), Ok(()));
        assert_eq!(admit("https://c.example", &mallory), Err(RefusalReason::TooMany { limit: 2 }));
        assert_eq!(admit("https://own.example", &NamedBy::Homeserver), Ok(()));
    }

    #[test]
    fn refusal_names_url_and_member() {
        let refusal = Admitted::default()
            .admit(
                &ServicePolicy::default(),
                &"http://jwt.evil.example".parse().unwrap(),
                &members(&["@m:evil.example"]),
            )
            .unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "refused to use http://jwt.evil.example, named by @m:evil.example: it is not https, so others could read our \
             OpenID token; its operator must serve it over https"
        );
        let nobody = NamedBy::Members(Vec::new());
        assert_eq!(
            admit(ServicePolicy::default(), "https://x.example", &nobody),
            Err(RefusalReason::NotNamed)
        );
    }

    #[test]
    fn token_servers_are_distinct_bounded_and_end_with_ours() {
        let own = server_name!("own.example");
        assert_eq!(token_servers(&NamedBy::Homeserver, own), [None]);
        let users = members(&["@a:x.example", "@b:x.example", "@c:own.example", "@d:y.example"]);
        let x = Some(owned_user_id!("@a:x.example").server_name().to_owned());
        let y = Some(owned_user_id!("@d:y.example").server_name().to_owned());
        assert_eq!(token_servers(&users, own), [x, y, None]);
        let many: Vec<_> = (0..50).map(|n| format!("@a:s{n}.example")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(token_servers(&members(&many), own).len(), 5);
    }
}
