//! Fixtures shared by the unit tests: synthetic views and an in-memory kernel.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use switchtower_proto::v1::*;

use crate::kernel::change::KernelChange;
use crate::kernel::dataplane::{
    Adopted, CommitError, Committed, Dataplane, Refused, Repaired, Stamp as KernelStamp,
};
use crate::probe::Prober;
use crate::state::{Round, State};

pub(crate) use switchtower_node_agent_testing::controller;
pub(crate) use switchtower_node_agent_testing::fleet::*;

/// A state that holds `services` Services with `endpoints` endpoints each, at generation 1.
pub(crate) fn state(services: u32, endpoints: u32) -> State {
    let mut state = State::new();
    let (update, parts) = Fleet::new(services, endpoints).snapshot();
    state.begin(&update).unwrap();
    parts.iter().for_each(|part| state.part(part).unwrap());
    state.end(&UpdateEnd { to: update.to }, std::time::Instant::now()).unwrap();
    state
}

/// A prober that only records the rounds.
#[derive(Clone, Default)]
pub(crate) struct NotingProber(pub(crate) Arc<Mutex<Vec<Round>>>);

impl Prober for NotingProber {
    fn start(&self, round: Round) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(round);
    }
}

impl NotingProber {
    /// Returns the last requested round.
    pub(crate) fn take(&self) -> Option<Round> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

/// A log whose level has no effect.
pub(crate) fn log() -> crate::log::LogLevel {
    crate::log::LogLevel::new("info", |_| Ok(()))
}

/// Content and history of the in-memory kernel.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) stamp: Option<KernelStamp>,
    pub(crate) pools: BTreeMap<PoolKey, std::collections::BTreeSet<Endpoint>>,
    pub(crate) frontends: BTreeMap<FrontendKey, Frontend>,
    /// Number of changes of each commit and adoption.
    pub(crate) commits: Vec<usize>,
    pub(crate) adoptions: usize,
    pub(crate) repairs: usize,
    /// Number of retries of refused items.
    pub(crate) retries: usize,
    /// Controllers of [`Dataplane::release`] calls.
    pub(crate) released: Vec<SocketAddr>,
    /// The settings in force.
    pub(crate) settings: Option<Settings>,
    /// Fail everything with this error number.
    pub(crate) fail: Option<i32>,
    /// Refuse the changes of this address family: `IPv4` or `IPv6`.
    pub(crate) refused_family: Option<&'static str>,
    /// Number of differences that a repair finds.
    pub(crate) differences: u32,
    /// Items reported as refused.
    pub(crate) refused: Vec<Refused>,
}

/// A kernel in memory. A clone shares its content, which survives the agent as in the real kernel.
#[derive(Clone, Default)]
pub(crate) struct MemoryKernel(pub(crate) Arc<Mutex<Memory>>);

impl MemoryKernel {
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn check(&self, operation: &str) -> Result<(), CommitError> {
        let operation = operation.to_owned();
        match (self.fail, self.refused_family) {
            (Some(errno), _) => Err(CommitError::Refused { operation, errno }),
            (None, Some(family)) => Err(CommitError::Family { family, operation, errno: libc::EPERM }),
            (None, None) => Ok(()),
        }
    }

    fn apply(&mut self, changes: &[KernelChange]) {
        for change in changes {
            match change.clone() {
                KernelChange::Frontend(frontend) => {
                    self.frontends.insert(frontend.key.clone().unwrap(), frontend);
                }
                KernelChange::FrontendRemoved(key) => assert!(self.frontends.remove(&key).is_some()),
                KernelChange::Pool { key, added, removed } => {
                    let pool = self.pools.entry(key).or_default();
                    removed.iter().for_each(|endpoint| assert!(pool.remove(endpoint)));
                    added.into_iter().for_each(|endpoint| assert!(pool.insert(endpoint)));
                }
                KernelChange::PoolRemoved(key) => assert!(self.pools.remove(&key).is_some()),
                KernelChange::Settings(settings) => self.settings = Some(settings),
                _ => {}
            }
        }
    }

    fn committed(&self, operations: usize) -> Committed {
        Committed { operations: operations as u32, refused: self.refused.clone(), ..Committed::default() }
    }
}

impl Dataplane for MemoryKernel {
    fn stamp(&mut self) -> Result<Option<KernelStamp>, CommitError> {
        let memory = self.lock();
        memory.check("read the stamp")?;
        Ok(memory.stamp)
    }

    fn adopt(&mut self, view: &[KernelChange], stamp: KernelStamp) -> Result<Adopted, CommitError> {
        let mut memory = self.lock();
        memory.check("adopt")?;
        memory.adoptions += 1;
        let mut fresh = Memory::default();
        fresh.apply(view);
        let members = |pools: &BTreeMap<PoolKey, std::collections::BTreeSet<Endpoint>>| -> std::collections::BTreeSet<(PoolKey, Endpoint)> {
            pools.iter().flat_map(|(key, all)| all.iter().map(|one| (key.clone(), one.clone()))).collect()
        };
        let (old, new) = (members(&memory.pools), members(&fresh.pools));
        let mut differences = old.symmetric_difference(&new).count();
        differences += fresh
            .frontends
            .iter()
            .filter(|(key, frontend)| memory.frontends.get(*key) != Some(frontend))
            .count();
        differences += memory.frontends.keys().filter(|key| !fresh.frontends.contains_key(*key)).count();
        let committed =
            (differences > 0 || memory.stamp != Some(stamp)).then(|| memory.committed(differences));
        if committed.is_some() {
            memory.commits.push(differences);
            memory.pools = fresh.pools;
            memory.frontends = fresh.frontends;
            memory.settings = fresh.settings;
            memory.stamp = Some(stamp);
        }
        Ok(Adopted { committed, refused: memory.refused.clone() })
    }

    fn commit(&mut self, changes: &[KernelChange], stamp: KernelStamp) -> Result<Committed, CommitError> {
        let mut memory = self.lock();
        memory.check("commit")?;
        memory.apply(changes);
        // Addresses of controllers have no effect here.
        let view = changes.iter().filter(|change| !matches!(change, KernelChange::Controllers(_))).count();
        if view > 0 {
            memory.commits.push(view);
        }
        memory.stamp = Some(stamp);
        Ok(memory.committed(changes.len()))
    }

    fn release(&mut self, controllers: &[SocketAddr]) -> Result<usize, CommitError> {
        let mut memory = self.lock();
        memory.check("release")?;
        memory.released.extend_from_slice(controllers);
        Ok(0)
    }

    fn repair(&mut self) -> Result<Repaired, CommitError> {
        let mut memory = self.lock();
        memory.check("repair")?;
        memory.repairs += 1;
        Ok(Repaired { differences: memory.differences, refused: memory.refused.clone() })
    }

    fn retry_refused(&mut self) -> Result<Vec<Refused>, CommitError> {
        let mut memory = self.lock();
        memory.check("retry")?;
        memory.retries += 1;
        Ok(memory.refused.clone())
    }
}
