//! Updates of a controller, as an agent receives them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| switchtower_node_agent::fuzzing::update(bytes));
