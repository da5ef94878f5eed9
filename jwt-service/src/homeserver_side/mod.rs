//! The homeserver's side of calls (MSC4195, the text that gives the token endpoints to homeservers): what this
//! service needs to answer them for a homeserver whose reverse proxy hands them over.
//!
//! Users show their access token instead of an OpenID token, and have to be in the Matrix room. Users of other
//! homeservers come through their own homeserver, whose signature is verified. Everything here but [`shell`] is
//! without I/O; the time is an argument.

mod answers;
mod bearer;
mod request;
mod server_keys;
mod shell;
mod signing_key;
mod x_matrix;

use std::fmt;

use url::Url;

pub use self::signing_key::{BadSigningKey, SigningKey};
pub(crate) use self::{
    answers::RemoteToken,
    bearer::{BadBearer, bearer},
    request::{DelegationRequest, FederationTokenRequest, Membership, RequestError, TokenRequest},
    shell::{AskError, Homeserver},
    x_matrix::Credentials,
};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::{
    answers::properties::homeserver_side_answer, bearer::properties::bearer_header,
    request::properties::membership_request, server_keys::properties::published_keys,
    signing_key::properties::signing_key_file, x_matrix::properties::signed_request,
};
use crate::{openid::ServerName, secret::Secret};

/// The homeserver that this service answers for.
#[derive(Clone)]
#[non_exhaustive]
pub struct HomeserverSide {
    /// Its server name: what comes after the colon in its users' Matrix IDs.
    pub name: ServerName,
    /// The base URL of its client-server API as it is reached from here, past the reverse proxy. Any address is
    /// allowed.
    pub url: Url,
    /// The token of an application service that is interested in all its users. With it, users of other
    /// homeservers get tokens for our SFU; without it, the endpoint for them is not there.
    pub application_service_token: Option<Secret>,
    /// Its signing key. With it, its users get tokens for other homeservers' SFUs.
    pub signing_key: Option<SigningKey>,
}

impl HomeserverSide {
    /// For the homeserver `name`, whose client-server API is at `url`. Its own users alone are served, and for
    /// its own SFU alone.
    pub fn new(name: ServerName, url: Url) -> Self {
        Self { name, url, application_service_token: None, signing_key: None }
    }
}

impl fmt::Debug for HomeserverSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HomeserverSide")
            .field("name", &self.name.as_str())
            .field("application_service_token", &self.application_service_token)
            .field("signing_key", &self.signing_key)
            .finish_non_exhaustive()
    }
}
