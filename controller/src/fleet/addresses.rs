//! Source addresses that agents are expected at: those of Nodes, and those that one authenticated from lately.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long an address stays known after an agent authenticated from it. Longer than a token is valid, so that an
/// agent behind address translation is known when it returns with the next one.
const REMEMBERED: Duration = Duration::from_secs(3 * 3_600);
/// Most remembered addresses beside those of Nodes.
const MOST: usize = 16_384;

#[derive(Debug, Default)]
struct Addresses {
    nodes: HashMap<Arc<str>, Vec<IpAddr>>,
    /// How many Nodes have the address.
    counts: HashMap<IpAddr, usize>,
    lately: HashMap<IpAddr, Instant>,
}

/// Addresses that agents are expected at; shared by the fleet, which learns them, and the port.
#[derive(Debug, Default)]
pub(crate) struct KnownAddresses(Mutex<Addresses>);

impl KnownAddresses {
    fn with<T>(&self, look: impl FnOnce(&mut Addresses) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The Node has these addresses from now on.
    pub(crate) fn node(&self, name: &Arc<str>, addresses: Vec<IpAddr>) {
        self.with(|known| {
            for address in &addresses {
                *known.counts.entry(*address).or_default() += 1;
            }
            if let Some(before) = known.nodes.insert(name.clone(), addresses) {
                known.forget(&before);
            }
        });
    }

    /// The Node is gone.
    pub(crate) fn gone(&self, name: &str) {
        self.with(|known| {
            if let Some(before) = known.nodes.remove(name) {
                known.forget(&before);
            }
        });
    }

    /// An agent authenticated from this address.
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
    fn addresses_of_nodes_come_and_go() {
        let (known, now) = (KnownAddresses::default(), Instant::now());
        let [a, b] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        known.node(&"n1".into(), vec![a]);
        known.node(&"n2".into(), vec![a, b]);
        assert!(known.contains(a, now) && known.contains(b, now));
        known.node(&"n2".into(), vec![b]);
        known.gone("n1");
        assert!(!known.contains(a, now) && known.contains(b, now));
        known.authenticated(a, now);
        assert!(known.contains(a, now + REMEMBERED / 2));
        assert!(!known.contains(a, now + REMEMBERED));
    }
}
