//! One fleet for all tests of a test program: three nodes in two zones. Each test has its own namespace of the
//! API, its own Services and virtual addresses.

use std::sync::OnceLock;

use switchtower_e2e::switchtower::{Fleet, NodeSpec};

/// The fleet; started by the test that comes first.
pub fn fleet() -> &'static Fleet {
    static FLEET: OnceLock<Fleet> = OnceLock::new();
    FLEET.get_or_init(|| {
        Fleet::start(&[
            NodeSpec::new("alpha", "east", &["a1", "a2"]),
            NodeSpec::new("beta", "east", &["b1"]),
            NodeSpec::new("gamma", "west", &["c1", "c2"]),
        ])
        .unwrap()
    })
}
