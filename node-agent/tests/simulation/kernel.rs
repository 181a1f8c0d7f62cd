//! A kernel in memory, and the desired state to compare it with.

use std::collections::{BTreeMap, BTreeSet};

use switchtower_core::view::View;
use switchtower_node_agent::kernel::change::KernelChange;
use switchtower_proto::v1::{Endpoint, Family, Frontend, FrontendKey, PoolKey, Role};

/// The items that forward packets: frontends, and pools with a member.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Content {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    pub pools: BTreeMap<PoolKey, BTreeSet<Endpoint>>,
}

impl Content {
    /// The desired content, merged by the controller's code, which is independent of the agent's.
    pub fn of(view: &View) -> Self {
        let mut content = Content::default();
        for frontend in view.frontends() {
            content.frontends.insert(frontend.key.clone().unwrap(), frontend.clone());
            let Some(port) = &frontend.service_port else { continue };
            for role in [Role::Cluster, Role::Local] {
                let Some(pool) = view.pool(port, Family::Ipv4, role).filter(|pool| !pool.is_empty()) else {
                    continue;
                };
                let (family, role) = (Family::Ipv4 as i32, role as i32);
                let key = PoolKey { service_port: Some(port.clone()), family, role };
                content.pools.insert(key, pool.clone());
            }
        }
        content
    }
}

/// The kernel of a node.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    pools: BTreeMap<PoolKey, BTreeSet<Endpoint>>,
    frontends: BTreeMap<FrontendKey, Frontend>,
    /// Generation and digest.
    pub stamp: Option<(u64, u128)>,
    /// Revision of the settings.
    pub settings: Option<u64>,
    /// Refuses every transaction.
    pub refuses: bool,
}

impl Kernel {
    /// Applies changes in one transaction. Removing what is absent, or adding what is present, is a violation.
    pub fn commit(&mut self, changes: &[KernelChange], stamp: (u64, u128)) -> bool {
        if self.refuses {
            return false;
        }
        changes.iter().for_each(|change| self.apply(change.clone()));
        self.stamp = Some(stamp);
        true
    }

    /// Makes the kernel hold exactly `view`.
    pub fn adopt(&mut self, view: &[KernelChange], stamp: (u64, u128)) -> bool {
        if self.refuses {
            return false;
        }
        *self = Kernel::default();
        self.commit(view, stamp)
    }

    /// Loses the tables.
    pub fn clear(&mut self) {
        let refuses = self.refuses;
        *self = Kernel { refuses, ..Kernel::default() };
    }

    fn apply(&mut self, change: KernelChange) {
        match change {
            KernelChange::Frontend(frontend) => {
                self.frontends.insert(frontend.key.clone().unwrap(), frontend);
            }
            KernelChange::Settings(settings) => self.settings = Some(settings.revision),
            KernelChange::FrontendRemoved(key) => {
                assert!(self.frontends.remove(&key).is_some(), "removes an absent frontend");
            }
            KernelChange::Pool { key, added, removed } => {
                let pool = self.pools.entry(key).or_default();
                removed
                    .iter()
                    .for_each(|endpoint| assert!(pool.remove(endpoint), "removes an absent member"));
                added
                    .into_iter()
                    .for_each(|endpoint| assert!(pool.insert(endpoint), "adds a present member"));
            }
            KernelChange::PoolRemoved(key) => {
                assert!(self.pools.remove(&key).is_some(), "removes an absent pool");
            }
            _ => {}
        }
    }

    fn served_pools(&self) -> usize {
        self.pools.values().filter(|members| !members.is_empty()).count()
    }

    /// Number of items that the delete budget counts.
    pub fn len(&self) -> usize {
        self.frontends.len() + self.served_pools()
    }

    /// Number of items in addition to `desired`; `None` if the kernel differs from it in anything else.
    pub fn surplus(&self, desired: &Content) -> Option<usize> {
        let frontends = desired.frontends.iter().all(|(key, one)| self.frontends.get(key) == Some(one));
        let pools = desired.pools.iter().all(|(key, one)| self.pools.get(key) == Some(one));
        (frontends && pools).then(|| self.len() - desired.frontends.len() - desired.pools.len())
    }
}
