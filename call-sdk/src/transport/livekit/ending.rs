//! Why a connection is over, and what follows from it.

use livekit_protocol::{self as proto, ReconnectReason, leave_request::Action};
use livekit_signaling::SignalError;

use crate::transport::{DisconnectReason, TransportError};

/// Why a connection is over.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// We leave.
    Left,
    /// It was interrupted; it may be resumed.
    Interrupted { reason: ReconnectReason, cause: String },
    /// It broke; another one may work.
    Lost(String),
    /// It ended for good.
    Gone(DisconnectReason),
}

/// What the SFU's Leave asks of us.
pub(super) fn left_by(leave: &proto::LeaveRequest) -> End {
    use proto::DisconnectReason as Reason;
    let reason = leave.reason();
    let text = reason.as_str_name().to_owned();
    match reason {
        Reason::DuplicateIdentity => End::Gone(DisconnectReason::DuplicateIdentity),
        Reason::ParticipantRemoved => End::Gone(DisconnectReason::Removed(text)),
        // Rooms are created by the authorisation service, with the token.
        Reason::RoomDeleted | Reason::RoomClosed => End::Gone(DisconnectReason::TokenRejected(text)),
        // It may be restarting.
        Reason::ServerShutdown => End::Lost(text),
        _ if leave.action() == Action::Disconnect && !leave.can_reconnect => {
            End::Gone(DisconnectReason::Removed(text))
        }
        _ if leave.action() == Action::Resume => {
            End::Interrupted { reason: ReconnectReason::RrUnknown, cause: text }
        }
        _ => End::Lost(text),
    }
}

/// What a failed attempt to resume means; `None`: another attempt may succeed.
pub(super) fn refused_resumption(error: &SignalError) -> Option<End> {
    match error {
        SignalError::LeaveRequest { reason, action } => {
            let leave = proto::LeaveRequest {
                reason: (*reason).into(),
                action: (*action).into(),
                ..Default::default()
            };
            match left_by(&leave) {
                // Resuming was what it refused.
                End::Interrupted { cause, .. } => Some(End::Lost(cause)),
                end => Some(end),
            }
        }
        SignalError::Handshake { .. } | SignalError::Client(..) => Some(End::Lost(describe(error))),
        _ => None,
    }
}

/// Whether trying again with the same token is useless.
pub(super) fn needs_new_token(error: &TransportError) -> Option<DisconnectReason> {
    match error {
        TransportError::Unauthorised { .. } | TransportError::RoomCreationRestricted => {
            Some(DisconnectReason::TokenRejected(error.to_string()))
        }
        _ => None,
    }
}

pub(super) fn lost(error: TransportError) -> End {
    End::Lost(describe(&error))
}

/// The error with its causes.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use proto::DisconnectReason as Reason;

    use super::*;

    fn leave(reason: Reason, action: Action, can_reconnect: bool) -> End {
        left_by(&proto::LeaveRequest {
            reason: reason.into(),
            action: action.into(),
            can_reconnect,
            ..Default::default()
        })
    }

    #[test]
    fn leave_reasons_are_typed() {
        let gone = |reason| match leave(reason, Action::Disconnect, false) {
            End::Gone(reason) => reason,
            end => panic!("{end:?}"),
        };
        assert_eq!(gone(Reason::DuplicateIdentity), DisconnectReason::DuplicateIdentity);
        assert!(matches!(gone(Reason::ParticipantRemoved), DisconnectReason::Removed(_)));
        assert!(matches!(gone(Reason::RoomDeleted), DisconnectReason::TokenRejected(_)));
        assert!(matches!(gone(Reason::UserRejected), DisconnectReason::Removed(_)));
    }

    #[test]
    fn leave_that_permits_a_reconnection_is_a_loss() {
        assert!(matches!(leave(Reason::ServerShutdown, Action::Disconnect, false), End::Lost(_)));
        assert!(matches!(leave(Reason::StateMismatch, Action::Reconnect, false), End::Lost(_)));
        assert!(matches!(leave(Reason::ConnectionTimeout, Action::Resume, false), End::Interrupted { .. }));
        let before_protocol_13 = leave(Reason::UnknownReason, Action::Disconnect, true);
        assert!(matches!(before_protocol_13, End::Lost(_)));
    }

    #[test]
    fn refused_resumption_is_a_loss_or_an_end() {
        let refused = |reason, action| refused_resumption(&SignalError::LeaveRequest { reason, action });
        assert!(matches!(refused(Reason::StateMismatch, Action::Reconnect), Some(End::Lost(_))));
        assert!(matches!(refused(Reason::ConnectionTimeout, Action::Resume), Some(End::Lost(_))));
        assert_eq!(
            refused(Reason::DuplicateIdentity, Action::Disconnect),
            Some(End::Gone(DisconnectReason::DuplicateIdentity))
        );
        assert_eq!(refused_resumption(&SignalError::Closed), None);
    }

    #[test]
    fn only_token_errors_need_a_new_token() {
        let unauthorised = TransportError::Unauthorised { status: 401, message: String::new() };
        assert!(needs_new_token(&unauthorised).is_some());
        assert!(needs_new_token(&TransportError::RoomCreationRestricted).is_some());
        assert_eq!(needs_new_token(&TransportError::Capacity { status: 503 }), None);
    }
}
