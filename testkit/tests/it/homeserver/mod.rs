//! The development homeserver, used as its clients use it: unmodified matrix-sdk, and plain HTTP.

mod delayed_leave_fires;
mod encrypted_room;
mod encrypted_to_device;
mod faults_on_request;
mod openid_over_tls;
mod refuses_bad_requests;
mod sticky_events_arrive;
mod support;
