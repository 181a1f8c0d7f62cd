//! Taking single frontends out of the kernel while nothing else may be written.

use std::io;
use std::net::SocketAddr;

use super::dump::{self, TableDump};
use super::element::{Element, Key};
use super::encode;
use super::netlink::{Batch, Socket};
use super::plan::controller_keys;

/// Removes what would send connections to these controllers elsewhere, from one family's table. ClusterIPs stay: an
/// agent whose controller is a Service reaches it through them. Returns how many elements were removed.
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
        // One at a time: that an element is absent must not keep the others.
        let mut batch = Batch::new();
        encode::removal(&mut batch, element);
        let failures = socket.commit(&mut batch)?;
        match failures.first() {
            None => removed += 1,
            Some(failure) if failure.errno == libc::ENOENT => {}
            Some(failure) => return Err(io::Error::from_raw_os_error(failure.errno)),
        }
    }
    Ok(removed)
}
