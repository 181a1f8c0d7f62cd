//! Known source addresses of agents: addresses of Nodes, and addresses from which an agent authenticated recently.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Time for which an address stays known after an agent authenticated from it. Longer than the lifetime of a token,
/// so that an agent behind address translation is still known when it reconnects with the next one.
const REMEMBERED: Duration = Duration::from_secs(3 * 3_600);
/// Maximum number of remembered addresses, not counting those of Nodes.
const MOST: usize = 16_384;

#[derive(Debug, Default)]
struct Addresses {
    nodes: HashMap<Arc<str>, Vec<IpAddr>>,
    /// Number of Nodes with the address.
    counts: HashMap<IpAddr, usize>,
    lately: HashMap<IpAddr, Instant>,
}

/// Known addresses, shared by the fleet, which updates them, and the gate.
#[derive(Debug, Default)]
pub(crate) struct KnownAddresses(Mutex<Addresses>);

impl KnownAddresses {
    fn with<T>(&self, look: impl FnOnce(&mut Addresses) -> T) -> T {
        look(&mut lock(&self.0))
    }

    /// Sets the addresses of a Node.
    pub(crate) fn set_node(&self, name: &Arc<str>, addresses: Vec<IpAddr>) {
        self.with(|known| {
            for address in &addresses {
                *known.counts.entry(*address).or_default() += 1;
            }
            if let Some(before) = known.nodes.insert(name.clone(), addresses) {
                known.forget(&before);
            }
        });
    }

    /// Removes the addresses of a Node.
    pub(crate) fn remove_node(&self, name: &str) {
        self.with(|known| {
            if let Some(before) = known.nodes.remove(name) {
                known.forget(&before);
            }
        });
    }

    /// Records that an agent authenticated from this address.
    pub(crate) fn authenticated(&self, source: IpAddr, now: Instant) {
        self.with(|known| {
            if known.lately.len() >= MOST {
                known.lately.retain(|_, at| now.saturating_duration_since(*at) < REMEMBERED);
            }
            if known.lately.len() < MOST || known.lately.contains_key(&source) {
                known.lately.insert(source, now);
            }
        });
    }

    pub(crate) fn contains(&self, source: IpAddr, now: Instant) -> bool {
        self.with(|known| {
            let lately = known.lately.get(&source);
            known.counts.contains_key(&source)
                || lately.is_some_and(|at| now.saturating_duration_since(*at) < REMEMBERED)
        })
    }
}

impl Addresses {
    fn forget(&mut self, addresses: &[IpAddr]) {
        for address in addresses {
            if let Some(count) = self.counts.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(address);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_nodes_and_expire() {
        let (known, now) = (KnownAddresses::default(), Instant::now());
        let [a, b] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        known.set_node(&"n1".into(), vec![a]);
        known.set_node(&"n2".into(), vec![a, b]);
        assert!(known.contains(a, now) && known.contains(b, now));
        known.set_node(&"n2".into(), vec![b]);
        known.remove_node("n1");
        assert!(!known.contains(a, now) && known.contains(b, now));
        known.authenticated(a, now);
        assert!(known.contains(a, now + REMEMBERED / 2));
        assert!(!known.contains(a, now + REMEMBERED));
    }
}
