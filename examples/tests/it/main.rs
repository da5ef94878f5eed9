//! The whole house against the programs that nobody here wrote: what each file is named after.
#![allow(clippy::disallowed_methods, reason = "a program is a shell: it owns the clock and the tasks")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod a_livekit_client_shares_a_call;
mod an_element_call_shares_a_call;
mod garbage_does_not_disturb_a_call;
mod support;
mod the_demo_holds_on_every_back_end;
mod the_examples_play_and_echo;
mod the_focus_sends_delegated_leaves;
