//! The netlink sockets of the agent. They belong to the network namespace of the thread that opens them.

use std::io;
use std::net::IpAddr;

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::tasks::{follow, sender, watch_drift};
use crate::engine::Command;
use crate::kernel::addresses::{Addresses, kernel_version};
use crate::kernel::conntrack::Conntrack;
use crate::kernel::nft::{ForeignProxy, Monitor, Nft};
use crate::metrics::Metrics;

/// The sockets, and the addresses read at the start.
pub(super) struct Sockets {
    pub(super) kernel: Nft,
    pub(super) flows: Conntrack,
    pub(super) host_addresses: Vec<IpAddr>,
    pub(super) watched: Watched,
}

/// Sources of notifications, each followed by a thread of its own.
pub(super) struct Watched {
    addresses: Addresses,
    foreign: ForeignProxy,
    drift: io::Result<Monitor>,
    /// Netlink port of the agent's own transactions, which are no drift.
    own_port: u32,
}

impl Sockets {
    /// Opens all sockets.
    pub(super) fn open() -> anyhow::Result<Self> {
        let mut kernel =
            Nft::open().context("open nf_tables netlink; does this kernel have CONFIG_NF_TABLES?")?;
        let own_port = kernel.port().context("open nf_tables netlink")?;
        // No reason to exit: each commit is a new attempt, and its failure is reported to the controller.
        if let Err(error) = kernel.check_support() {
            tracing::error!(kernel = kernel_version(), %error, "the kernel does not accept the rules");
        }
        let drift = Monitor::open(own_port);
        let foreign = ForeignProxy::open().context("open nf_tables netlink")?;
        let flows = Conntrack::open().context("open conntrack netlink")?;
        let mut addresses = Addresses::open().context("open route netlink")?;
        let host_addresses = addresses.read().context("read the addresses of the interfaces")?;
        Ok(Self { kernel, flows, host_addresses, watched: Watched { addresses, foreign, drift, own_port } })
    }
}

impl Watched {
    /// Starts the threads.
    pub(super) fn follow(self, commands: &mpsc::Sender<Command>, metrics: &Metrics) -> anyhow::Result<()> {
        let Self { addresses, foreign, drift, own_port } = self;
        follow("addresses", commands, move |commands| {
            addresses.follow(sender(commands, Command::HostAddresses));
        })?;
        follow("foreign-proxy", commands, move |commands| {
            foreign.follow(sender(commands, Command::ForeignProxy));
        })?;
        let watched = metrics.drift_watched.clone();
        follow("drift", commands, move |commands| watch_drift(drift, own_port, commands, &watched))
    }
}
