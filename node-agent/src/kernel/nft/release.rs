//! Removes single frontends from the kernel while nothing else may be written.

use std::io;
use std::net::SocketAddr;

use super::batch::Batch;
use super::dump::{self, TableDump};
use super::element::{Element, Key};
use super::encode;
use super::plan::controller_keys;
use crate::kernel::netlink::Socket;

/// Removes the elements of one family that would redirect connections to these controllers. ClusterIPs stay: an agent
/// whose controller is a Service reaches it through them. Returns the number of removed elements.
pub(super) fn release<const N: usize>(socket: &mut Socket, controllers: &[SocketAddr]) -> io::Result<usize> {
    let keys = controller_keys::<N>(controllers);
    if keys.is_empty() {
        return Ok(0);
    }
    let mut dump = TableDump::<N>::default();
    match dump::elements(socket, "cluster_ips", &mut dump) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(0),
        other => other?,
    }
    let mut removed = 0;
    let external =
        keys.into_iter().filter(|key| !dump.elements.contains_key(&Element::ClusterIp(key.address)));
    for element in external.flat_map(|key: Key<N>| {
        [Element::Frontend(key), Element::Refused(key), Element::RefusedNodePort(key)]
    }) {
        // One per transaction: an absent element must not prevent the removal of the others.
        let mut batch = Batch::new();
        encode::removal(&mut batch, element);
        let failures = batch.commit(socket)?;
        match failures.first() {
            None => removed += 1,
            Some(failure) if failure.errno == libc::ENOENT => {}
            Some(failure) => return Err(io::Error::from_raw_os_error(failure.errno)),
        }
    }
    Ok(removed)
}
