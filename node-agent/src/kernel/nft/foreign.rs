//! Detects kube-proxy's rules: requested by exact name, never listed or parsed.
//!
//! `table ip kube-proxy` and `table ip6 kube-proxy` are its nftables mode, the chain `KUBE-SERVICES` in the table
//! `nat` is its iptables and ipvs modes as iptables-nft writes them. Chains of legacy iptables are not in nf_tables:
//! [`LegacyTables`] finds them.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use super::batch::{self, Get};
use super::layout::{FAMILY_IPV4, FAMILY_IPV6};
use super::nfta::{chain, table};
use crate::kernel::legacy::LegacyTables;
use crate::kernel::netlink::Socket;
use crate::kernel::netlink::wire::Writer;

/// Interval between two checks: kube-proxy does not announce its start or end, and four short requests are no load.
const INTERVAL: Duration = Duration::from_secs(5);

/// Detects the rules of kube-proxy in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct ForeignProxy {
    socket: Socket,
    legacy: LegacyTables,
}

impl ForeignProxy {
    /// Opens a netlink socket.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the process has too many open files.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(ForeignProxy { socket: batch::open()?, legacy: LegacyTables::default() })
    }

    /// Returns whether rules of kube-proxy exist.
    ///
    /// # Errors
    /// The kernel refused the request.
    pub(crate) fn present(&mut self) -> io::Result<bool> {
        let own_table = |writer: &mut Writer| writer.string(table::NAME, "kube-proxy");
        let services = |writer: &mut Writer| {
            writer.string(chain::TABLE, "nat");
            writer.string(chain::NAME, "KUBE-SERVICES");
        };
        for family in [FAMILY_IPV4, FAMILY_IPV6] {
            if Get::one(libc::NFT_MSG_GETTABLE, family).exists(&mut self.socket, own_table)?
                || Get::one(libc::NFT_MSG_GETCHAIN, family).exists(&mut self.socket, services)?
            {
                return Ok(true);
            }
        }
        self.legacy.present()
    }

    /// Reports every change, starting from absent, until `report` breaks.
    pub(crate) fn follow(mut self, mut report: impl FnMut(bool) -> ControlFlow<()>) {
        let mut reported = false;
        loop {
            match self.present() {
                Ok(present) if present != reported => {
                    reported = present;
                    if report(present).is_break() {
                        return;
                    }
                }
                Ok(_) => {}
                // Without CAP_NET_ADMIN every request fails; the first commit reports that to the controller.
                Err(error) => tracing::debug!(%error, "cannot check for kube-proxy's rules"),
            }
            std::thread::sleep(INTERVAL);
        }
    }
}
