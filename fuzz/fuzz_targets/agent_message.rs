//! Messages of an agent, as a controller receives them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| switchtower_controller::fuzzing::agent_message(bytes));
