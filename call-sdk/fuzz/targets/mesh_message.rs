//! What a mesh member says, and what the connection to it does: see `mesh_message`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| antiphon_call_sdk::transport::mesh::mesh_message(data));
