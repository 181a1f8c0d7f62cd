//! Datagrams of the kernel, as an agent reads them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| switchtower_node_agent::fuzzing::netlink(bytes));
