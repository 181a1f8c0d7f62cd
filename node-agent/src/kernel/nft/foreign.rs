//! Whether kube-proxy's rules exist beside ours: asked for by exact name, never listed or parsed.
//!
//! `table ip kube-proxy` and `table ip6 kube-proxy` are its nftables mode, the chain `KUBE-SERVICES` in the table
//! `nat` is its iptables and ipvs modes as iptables-nft writes them. Chains of legacy iptables are not in
//! nf_tables and are not seen.

use std::io;
use std::time::Duration;

use tokio::sync::mpsc;

use super::layout::{FAMILY_IPV4, FAMILY_IPV6};
use super::netlink::{GET_CHAIN, GET_TABLE, Socket};
use super::wire::Writer;
use crate::engine::Command;

/// Nobody announces to us that kube-proxy comes or goes; four short questions this often are no load.
const INTERVAL: Duration = Duration::from_secs(5);

/// Asks the kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct ForeignProxy {
    socket: Socket,
}

impl ForeignProxy {
    /// Opens a netlink socket.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the process may open no more files.
    pub fn open() -> io::Result<Self> {
        Ok(ForeignProxy { socket: Socket::open()? })
    }

    /// Whether rules of kube-proxy exist.
    ///
    /// # Errors
    /// The kernel refused the question.
    pub fn present(&mut self) -> io::Result<bool> {
        for family in [FAMILY_IPV4, FAMILY_IPV6] {
            let table = |writer: &mut Writer| writer.string(1, "kube-proxy");
            let chain = |writer: &mut Writer| {
                writer.string(1, "nat");
                writer.string(3, "KUBE-SERVICES");
            };
            if self.exists(GET_TABLE, family, table)? || self.exists(GET_CHAIN, family, chain)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn exists(&mut self, kind: u16, family: u8, name: impl Fn(&mut Writer)) -> io::Result<bool> {
        match self.socket.request((kind, family, false), name, |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells the engine at the start and whenever it changes, until the engine is gone.
    pub fn follow(mut self, commands: &mpsc::Sender<Command>) {
        let mut told = false;
        loop {
            match self.present() {
                Ok(present) if present != told => {
                    told = present;
                    if commands.blocking_send(Command::ForeignProxy(present)).is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                // Without CAP_NET_ADMIN nothing can be asked; the first commit says so to the controller.
                Err(error) => tracing::debug!(%error, "whether kube-proxy's rules exist cannot be asked"),
            }
            if commands.is_closed() {
                return;
            }
            std::thread::sleep(INTERVAL);
        }
    }
}
