//! What goes to an authorisation service, and the claims of the tokens that come back (MSC4195).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{EndpointError, Malformed};
use crate::{
    matrix::{MatrixPort, OpenIdToken},
    member::{MemberId, Slot},
};

/// Longest answer that is read, in bytes.
pub(super) const MAX_REPLY: usize = 64 * 1024;

/// A body for an authorisation service. Services refuse members that they do not know, so nothing else is in it.
pub(super) enum ServiceBody<'a> {
    /// `/sfu/get`.
    SfuGet,
    /// `/get_token`.
    GetToken { slot: &'a Slot, member_id: &'a MemberId },
    /// `/delegate_delayed_leave`.
    DelegateLeave { slot: &'a Slot, member_id: &'a MemberId },
}

/// The delayed leave that a service is to keep.
#[derive(Serialize)]
pub(super) struct DelayFields<'a> {
    pub(super) delay_id: &'a str,
    /// In milliseconds.
    pub(super) delay_timeout: u64,
}

impl ServiceBody<'_> {
    pub(super) fn path(&self) -> &'static str {
        match self {
            Self::SfuGet => "/sfu/get",
            Self::GetToken { .. } => "/get_token",
            Self::DelegateLeave { .. } => "/delegate_delayed_leave",
        }
    }

    /// The JSON text, wiped when it has been sent.
    pub(super) fn json(
        &self,
        port: &dyn MatrixPort,
        openid_token: &OpenIdToken,
        delay: Option<&DelayFields<'_>>,
    ) -> Result<Bytes, EndpointError> {
        #[derive(Serialize)]
        struct SfuGet<'a> {
            room: &'a str,
            openid_token: &'a OpenIdToken,
            device_id: &'a str,
            #[serde(flatten)]
            delay: Option<&'a DelayFields<'a>>,
        }
        #[derive(Serialize)]
        struct GetToken<'a> {
            room_id: &'a str,
            slot_id: String,
            openid_token: &'a OpenIdToken,
            member: Claimed<'a>,
            #[serde(flatten)]
            delay: Option<&'a DelayFields<'a>>,
        }
        #[derive(Serialize)]
        struct Claimed<'a> {
            id: &'a str,
            claimed_user_id: &'a str,
            claimed_device_id: &'a str,
        }
        let (room, device) = (port.room_id().as_str(), port.device());
        // Large enough for every field: growing would leave copies behind.
        let mut json = Zeroizing::new(Vec::with_capacity(16 * 1024));
        match self {
            Self::SfuGet => {
                let device_id = device.device_id.as_str();
                serde_json::to_writer(&mut *json, &SfuGet { room, openid_token, device_id, delay })
            }
            Self::GetToken { slot, member_id } | Self::DelegateLeave { slot, member_id } => {
                let member = Claimed {
                    id: &member_id.0,
                    claimed_user_id: device.user_id.as_str(),
                    claimed_device_id: device.device_id.as_str(),
                };
                let slot_id = slot.slot_id();
                let body = GetToken { room_id: room, slot_id, openid_token, member, delay };
                serde_json::to_writer(&mut *json, &body)
            }
        }
        .map_err(|_| EndpointError::Malformed(Malformed::Json))?;
        Ok(Bytes::from_owner(json))
    }
}

/// What we read of an access token.
#[derive(Deserialize)]
pub(super) struct Claims {
    /// Our identity.
    pub(super) sub: String,
    pub(super) video: Option<Video>,
}

/// The grants.
#[derive(Default, Deserialize)]
pub(super) struct Video {
    pub(super) room: Option<String>,
    #[serde(rename = "canPublish")]
    pub(super) can_publish: Option<bool>,
}

/// Reads the claims of a token without checking its signature, which only the SFU can.
pub(super) fn claims(jwt: &str) -> Result<Claims, EndpointError> {
    let read = || {
        let mut parts = jwt.split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let json = URL_SAFE_NO_PAD.decode(claims.trim_end_matches('=')).ok()?;
        serde_json::from_slice::<Claims>(&json).ok().filter(|claims| !claims.sub.is_empty())
    };
    if jwt.len() > MAX_REPLY {
        return Err(EndpointError::Malformed(Malformed::TooLong));
    }
    read().ok_or(EndpointError::Malformed(Malformed::Token))
}
