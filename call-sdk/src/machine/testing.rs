//! Members for the tests of the machine's rooms.

use ruma_common::{OwnedDeviceId, UserId};

use crate::{
    member::{Device, Member, MemberId, MembershipForm, ParticipantIdentity},
    time::UnixMillis,
    transport::{LiveKitFocus, Transport},
};

pub(crate) fn device(user: &str, device: &str) -> Device {
    Device::new(UserId::parse(user).unwrap(), OwnedDeviceId::from(device))
}

pub(crate) fn focus(service: &str) -> LiveKitFocus {
    LiveKitFocus::of_service(service.parse().unwrap())
}

/// A state member, as deployed clients write it.
pub(crate) fn state_member(user: &str, device: &str, created: u64) -> Member {
    let user_id = UserId::parse(user).unwrap();
    let device_id = OwnedDeviceId::from(device);
    Member {
        member_id: MemberId::of_state_member(&user_id, &device_id),
        identities: vec![ParticipantIdentity::of_device(&user_id, &device_id)],
        user_id,
        device_id: Some(device_id),
        form: MembershipForm::State,
        created: UnixMillis(created),
        expires_at: None,
        transports: vec![Transport::LiveKit(focus("https://sfu.example"))],
        intent: None,
        event_id: None,
        reads_msc_keys: false,
    }
}

/// A sticky member with the member id `member`.
pub(crate) fn sticky_member(user: &str, device: &str, member: &str, created: u64) -> Member {
    let state = state_member(user, device, created);
    let member_id = MemberId(member.to_owned());
    let device_id = OwnedDeviceId::from(device);
    Member {
        identities: vec![
            ParticipantIdentity::of_member(&state.user_id, &member_id),
            ParticipantIdentity::of_claimed_device(&state.user_id, &device_id, &member_id),
        ],
        member_id,
        form: MembershipForm::Sticky,
        reads_msc_keys: true,
        ..state
    }
}
