#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| antiphon_jwt_service::fuzzing::run("homeserver_document", data));
