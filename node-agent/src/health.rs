//! Health of the node, with kube-proxy's semantics.
//!
//! `/healthz` (200 if the data plane keeps up and the node is eligible) and `/livez` (without eligibility) are
//! for load balancers and the kubelet; neither depends on the controller. The node is unhealthy only while
//! its oldest uncommitted change is older than twice the sync period, or the engine has been executing one command for
//! that long.
//!
//! healthCheckNodePort answers follow the commit: published targets match the kernel.

mod bounded;
mod node_ports;
mod server;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use switchtower_proto::address_bytes;
use switchtower_proto::v1::{Cidr, ProxyMode, Settings};
use tokio::net::TcpSocket;
use tokio::sync::watch;

use crate::state::State;

pub(crate) use node_ports::listen;
pub(crate) use node_ports::{BindFailures, serve_node_ports};
pub(crate) use server::{health_router, metrics_router, serve, serve_in_mode};

/// Age of a change that makes the node unhealthy: twice kube-proxy's default syncPeriod.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// One healthCheckNodePort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Check {
    /// The port.
    pub(crate) port: u16,
    /// Distinct local ready IPv4 addresses.
    pub(crate) ready_ipv4: u32,
    /// Distinct local ready IPv6 addresses.
    pub(crate) ready_ipv6: u32,
}

/// healthCheckNodePorts with their addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HealthTargets {
    /// Port and local endpoints by (namespace, name) of the Service.
    pub(crate) checks: BTreeMap<(String, String), Check>,
    /// Addresses to listen on; an unspecified one covers its family.
    pub(crate) bind: Vec<IpAddr>,
    /// The Node is known, and neither deleted nor about to be.
    pub(crate) eligible: bool,
}

impl HealthTargets {
    /// From the view and the addresses of the node's interfaces.
    pub(crate) fn of(state: &State, host_addresses: &[IpAddr]) -> Self {
        // In mode Shadow the ports belong to another proxy.
        let shadow = state.settings().map(Settings::mode) == Some(ProxyMode::Shadow);
        let checks = state.health_checks().filter(|_| !shadow).filter_map(|check| {
            let key = check.key.clone()?;
            let port = u16::try_from(check.port).ok()?;
            let check = Check { port, ready_ipv4: check.ready_ipv4, ready_ipv6: check.ready_ipv6 };
            Some(((key.namespace, key.name), check))
        });
        HealthTargets {
            checks: checks.collect(),
            bind: bind_addresses(state, host_addresses),
            eligible: state.node().is_some_and(|node| node.eligible),
        }
    }
}

/// Returns all addresses if nodePortAddresses match all, the node's primary ones if there are none, else the host's
/// addresses inside them.
fn bind_addresses(state: &State, host_addresses: &[IpAddr]) -> Vec<IpAddr> {
    let cidrs = state.settings().map(|settings| settings.node_port_addresses.as_slice()).unwrap_or_default();
    let mut addresses: Vec<IpAddr> = if cidrs.is_empty() {
        let node = state.node().map(|node| node.addresses.as_slice()).unwrap_or_default();
        node.iter().filter_map(|bytes| address(bytes)).collect()
    } else {
        let all = cidrs.iter().filter(|cidr| cidr.prefix_length == 0);
        let unspecified = all.filter_map(|cidr| address(&cidr.address));
        let inside = host_addresses
            .iter()
            .filter(|address| cidrs.iter().any(|cidr| cidr.prefix_length > 0 && contains(cidr, **address)));
        unspecified.chain(inside.copied()).collect()
    };
    let covered = |one: &IpAddr, all: &[IpAddr]| {
        !one.is_unspecified()
            && all.iter().any(|other| other.is_unspecified() && other.is_ipv4() == one.is_ipv4())
    };
    let all = addresses.clone();
    addresses.retain(|one| !covered(one, &all));
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Restricts an IPv6 socket to IPv6, or lets it accept IPv4 as well.
fn only_ipv6(socket: &TcpSocket, only: bool) -> std::io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let value = libc::c_int::from(only);
    // SAFETY: the descriptor is open and `value` lives through the call, with its own size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_V6ONLY,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns the address in a message.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

fn contains(cidr: &Cidr, address: IpAddr) -> bool {
    let bytes = address_bytes(address);
    bytes.len() == cidr.address.len()
        && bytes.iter().zip(&cidr.address).enumerate().all(|(index, (left, right))| {
            let kept = cidr.prefix_length.saturating_sub(index as u32 * 8).min(8);
            let mask = if kept == 0 { 0 } else { 0xff_u8 << (8 - kept) };
            (left ^ right) & mask == 0
        })
}

#[derive(Debug, Default)]
struct Shared {
    /// Arrival of the oldest uncommitted change.
    queued: Option<Instant>,
    /// Start of the command that the engine is executing.
    busy: Option<Instant>,
    /// The kernel holds a view that the agent knows.
    holds_view: bool,
    /// [`Health::ready`] was true once.
    ready: bool,
    applied: Option<SystemTime>,
}

/// Health, shared by the engine that sets it and the servers that report it.
#[derive(Clone)]
pub(crate) struct Health {
    shared: Arc<Mutex<Shared>>,
    targets: watch::Sender<HealthTargets>,
    mode: watch::Sender<ProxyMode>,
}

/// One reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    /// The data plane keeps up.
    pub(crate) healthy: bool,
    /// The Node is known and eligible for load balancers.
    pub(crate) eligible: bool,
    /// The last commit.
    pub(crate) last_updated: Option<SystemTime>,
    /// The kernel holds a view that the agent knows.
    pub(crate) holds_view: bool,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            shared: Arc::default(),
            targets: watch::Sender::new(HealthTargets::default()),
            mode: watch::Sender::new(ProxyMode::Active),
        }
    }
}

impl Health {
    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an uncommitted change.
    pub(crate) fn queued(&self) {
        self.lock().queued.get_or_insert_with(Instant::now);
    }

    /// Notes that everything is committed.
    pub(crate) fn applied(&self) {
        let mut shared = self.lock();
        (shared.queued, shared.applied, shared.holds_view) = (None, Some(SystemTime::now()), true);
    }

    /// Notes that the kernel forwards by a newer generation than the agent's view.
    pub(crate) fn held(&self) {
        self.lock().holds_view = true;
    }

    /// Returns whether this agent can replace another one: the kernel holds a view, and the agent's bootstrap files are
    /// `usable`. It stays true: a controller or files that disappear later take no node out of service.
    pub(crate) fn ready(&self, usable: bool) -> bool {
        let mut shared = self.lock();
        shared.ready |= shared.holds_view && usable;
        shared.ready
    }

    /// Notes that the engine starts a command.
    pub(crate) fn busy(&self) {
        self.lock().busy = Some(Instant::now());
    }

    /// Notes that the engine is idle.
    pub(crate) fn idle(&self) {
        self.lock().busy = None;
    }

    /// Publishes the targets in the kernel; wakes subscribers only if they changed.
    pub(crate) fn publish(&self, targets: HealthTargets) {
        self.targets.send_if_modified(|current| {
            let changed = *current != targets;
            *current = targets;
            changed
        });
    }

    /// Publishes the mode of the settings in force; wakes subscribers only if it changed.
    pub(crate) fn publish_mode(&self, mode: ProxyMode) {
        self.mode.send_if_modified(|current| std::mem::replace(current, mode) != mode);
    }

    /// Subscribes to the mode of the settings in force.
    pub(crate) fn mode(&self) -> watch::Receiver<ProxyMode> {
        self.mode.subscribe()
    }

    /// Subscribes to the published targets.
    pub(crate) fn subscribe(&self) -> watch::Receiver<HealthTargets> {
        self.targets.subscribe()
    }

    /// Returns the current reading.
    pub(crate) fn read(&self) -> Reading {
        self.read_at(Instant::now())
    }

    fn read_at(&self, now: Instant) -> Reading {
        let shared = self.lock();
        let fresh = |since: Instant| now.saturating_duration_since(since) < STALE_AFTER;
        let healthy = shared.queued.into_iter().chain(shared.busy).all(fresh);
        let eligible = self.targets.borrow().eligible;
        Reading { healthy, eligible, last_updated: shared.applied, holds_view: shared.holds_view }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn only_an_old_change_makes_it_unhealthy() {
        let health = Health::default();
        assert!(health.read().healthy, "before the first commit too");
        health.queued();
        let now = Instant::now();
        assert!(health.read_at(now + STALE_AFTER / 2).healthy);
        // A later change does not make the oldest younger.
        health.queued();
        assert!(!health.read_at(now + STALE_AFTER).healthy);
        health.applied();
        assert!(health.read_at(now + 10 * STALE_AFTER).healthy, "idle for long is healthy");
    }

    #[test]
    fn stuck_engine_is_unhealthy() {
        let health = Health::default();
        health.busy();
        let now = Instant::now();
        assert!(health.read_at(now + STALE_AFTER / 2).healthy);
        assert!(!health.read_at(now + STALE_AFTER).healthy, "though nothing is queued");
        health.idle();
        assert!(health.read_at(now + STALE_AFTER).healthy);
    }

    #[test]
    fn ready_needs_a_view_and_usable_files_and_lasts() {
        let health = Health::default();
        assert!(!health.ready(true), "the kernel holds nothing");
        health.applied();
        assert!(!health.ready(false), "by a file, and no controller can ever be found");
        assert!(health.ready(true));
        assert!(health.ready(false), "it worked once");
    }

    #[test]
    fn health_checks_listen_on_the_primary_addresses_by_default() {
        let state = testing::state(1, 1);
        let targets = HealthTargets::of(&state, &["198.51.100.7".parse().unwrap()]);
        assert_eq!(targets.bind, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert!(targets.eligible);
        let cidr = Cidr { address: vec![198, 51, 100, 0], prefix_length: 22 };
        assert!(contains(&cidr, "198.51.103.255".parse().unwrap()));
        assert!(!contains(&cidr, "198.51.104.0".parse().unwrap()));
        assert!(!contains(&cidr, "::1".parse().unwrap()));
    }
}
