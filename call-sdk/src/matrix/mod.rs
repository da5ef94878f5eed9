//! Matrix as a call sees it: the vocabulary that the machine uses, the port that performs it, and the adapter over
//! matrix-sdk.

mod events;
#[cfg(feature = "shell")]
mod port;
mod request;
#[cfg(feature = "matrix-sdk")]
pub mod sdk;

pub use events::{
    MatrixUpdate, MemberEvent, OlmSender, OwnTrust, RoomEvent, RoomView, SlotEvent, ToDeviceEvent,
    TrustPolicy,
};
#[cfg(feature = "shell")]
pub use port::{MatrixError, MatrixPort};
pub use request::{
    ApiVersion, DelayId, DelayedAction, DelayedEvent, Delivery, DeliveryFailure, EventTarget, EventWrite,
    Jwt, MatrixReply, MatrixRequest, OpenIdToken, RequestError, RtcTokenRequest, ScheduleForm, ServerSupport,
    ToDeviceBatch, TransportSource, TurnServers,
};
