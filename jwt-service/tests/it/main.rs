//! The service as its peers see it: a client over HTTP, a homeserver over TLS, an SFU over Twirp.
//! [`requirements`] says which test holds what.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::disallowed_methods, reason = "tests own their clock and tasks")]

mod child;
mod support;

mod a_killed_client_leaves_the_call;
mod a_replica_stops;
mod admission;
mod browsers;
mod client_documents;
mod dead_paths;
mod delegated_leave;
mod deployed_files;
mod discovery;
mod documented_settings;
mod full_redis;
mod hostile_requests;
mod hung_restarts;
mod jobs_in_redis;
mod jobs_survive_kills;
mod limits_on_clients;
mod listeners;
mod members_alone_enter;
mod openid_tokens;
mod other_homeservers_users;
mod program;
mod readiness;
mod real_homeservers_vouch;
mod redirected_delayed_events;
mod redis_comes_and_goes_under_load;
mod refusals;
mod refused_webhooks;
mod replicas;
mod request_ids;
mod requirements;
mod reset_connections;
mod restoring_late;
mod sfu_calls;
mod stars_in_lists;
mod strangers_addresses;
mod without_root_certificates;
