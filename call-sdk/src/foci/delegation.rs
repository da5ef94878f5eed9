//! Delegation of our delayed leave (MSC4195 §Delegation of Delayed Leave): a service that learns from the SFU that we
//! are gone has the homeserver send our leave at once, whatever became of this process.
//!
//! A service watches one identity, so the leave goes to the generation of endpoint that issued the publishing token.

use std::time::Duration;

use super::{
    Access, AccessRequest, Endpoint, EndpointError, SfuAccess,
    wire::{DelayFields, ServiceBody},
};
use crate::matrix::{DelayId, MatrixPort, MatrixRequest, RequestError};

/// Why nobody took our delayed leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DelegationError {
    /// It may work later.
    #[error("the delayed leave could not be delegated now: {0}")]
    Later(EndpointError),
    /// It is not offered here, or not for us: keep the delayed leave ourselves.
    #[error("delayed leaves cannot be delegated here: {0}")]
    NotOffered(EndpointError),
}

impl DelegationError {
    fn of(error: EndpointError) -> Self {
        match error {
            EndpointError::RateLimited { .. }
            | EndpointError::Unavailable { .. }
            | EndpointError::TimedOut(_)
            // The service could not ask our homeserver.
            | EndpointError::Refused { status: 401, .. }
            | EndpointError::OpenId(
                RequestError::RateLimited { .. } | RequestError::Network { .. } | RequestError::TimedOut,
            ) => Self::Later(error),
            error => Self::NotOffered(error),
        }
    }
}

impl From<DelegationError> for RequestError {
    /// As the membership machine reads answers: passing failures stay passing, everything else is final.
    fn from(error: DelegationError) -> Self {
        match error {
            DelegationError::Later(
                EndpointError::RateLimited { retry_after }
                | EndpointError::OpenId(Self::RateLimited { retry_after }),
            ) => Self::RateLimited { retry_after },
            DelegationError::Later(EndpointError::TimedOut(_) | EndpointError::OpenId(Self::TimedOut)) => {
                Self::TimedOut
            }
            DelegationError::Later(error) => Self::Network { cause: error.to_string() },
            DelegationError::NotOffered(EndpointError::LoggedOut) => Self::LoggedOut,
            DelegationError::NotOffered(EndpointError::NotThere { .. }) => Self::Unsupported,
            DelegationError::NotOffered(EndpointError::Refused { status, errcode, message }) => {
                Self::Refused { status, errcode, message }
            }
            DelegationError::NotOffered(error) => {
                Self::Refused { status: 0, errcode: String::new(), message: error.to_string() }
            }
        }
    }
}

impl Access {
    /// Hands a delayed leave to the issuer of our publishing token, once. A new one replaces the old. `delay` is how
    /// long after its last restart the leave is sent.
    ///
    /// # Errors
    /// [`DelegationError`], sorted into what may work later and what is not offered.
    pub async fn delegate(
        &self,
        port: &dyn MatrixPort,
        access: &SfuAccess,
        delay_id: &DelayId,
        delay: Duration,
    ) -> Result<(), DelegationError> {
        let AccessRequest { slot, member_id, .. } = &access.request;
        let to_service = async |body: ServiceBody<'_>| {
            let Some(service) = &access.request.focus.service else {
                return Err(EndpointError::NotThere { status: 404 });
            };
            let delay_timeout = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            let delay = DelayFields { delay_id: &delay_id.0, delay_timeout };
            let (named_by, timeout) = (&access.request.named_by, self.timing.request);
            // A token in the answer is not needed: the connection has one.
            self.post(port, service, named_by, &body, Some(&delay), timeout).await.map(drop)
        };
        let delegated = match access.issued_by {
            Endpoint::Homeserver(version) => {
                let sfu = access.request.focus.sfu.as_ref().unwrap_or(&access.sfu);
                let leave = MatrixRequest::DelegateLeave {
                    version,
                    sfu: sfu.clone(),
                    slot: slot.clone(),
                    member_id: member_id.clone(),
                    delay_id: delay_id.clone(),
                };
                let timeout = self.timing.request;
                let answer = port.perform(leave, timeout).await;
                answer.map(drop).map_err(|error| EndpointError::of_homeserver(error, timeout))
            }
            Endpoint::GetToken => match to_service(ServiceBody::DelegateLeave { slot, member_id }).await {
                // Services of before the endpoint take the leave with a token request.
                Err(EndpointError::NotThere { .. }) => {
                    to_service(ServiceBody::GetToken { slot, member_id }).await
                }
                answer => answer,
            },
            // `/delegate_delayed_leave` watches the hashed identity, so it would never see us.
            Endpoint::SfuGet => to_service(ServiceBody::SfuGet).await,
        };
        delegated.map_err(DelegationError::of)
    }
}
