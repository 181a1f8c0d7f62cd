//! Continuous new connections from a pod, to Services whose endpoints change.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Phase;
use crate::lab::namespace::Namespace;
use crate::probe::{self, TIMEOUT, Transport};

/// Pause between two connections of a prober.
const PAUSE: Duration = Duration::from_millis(8);

/// Counts of one prober.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    tried: AtomicU64,
    lost: AtomicU64,
}

impl Traffic {
    /// Numbers of connections that were tried and lost so far.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.tried.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }

    /// Opens connections from a namespace until the end, in turn to each destination, over TCP and UDP. A connection that no
    /// pod answers is lost.
    pub(super) fn probe(&self, from: &Namespace, to: &[SocketAddr], phase: &Phase) -> anyhow::Result<()> {
        from.run(|| {
            let ways = to.iter().flat_map(|to| [(Transport::Tcp, *to), (Transport::Udp, *to)]);
            for (transport, to) in ways.collect::<Vec<_>>().into_iter().cycle() {
                if phase.is_over() {
                    break;
                }
                let outcome = probe::once(transport, to, TIMEOUT)?;
                self.tried.fetch_add(1, Ordering::Relaxed);
                if outcome.backend().is_none() {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                    eprintln!("lost: {transport:?} from {} to {to}: {outcome}", from.name());
                }
                std::thread::sleep(PAUSE);
            }
            Ok(())
        })?
    }
}
