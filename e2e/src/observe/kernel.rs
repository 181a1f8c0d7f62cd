//! Reads what a node's kernel holds with `nft -j`, sharing no code with the agent that wrote it.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::namespace::Namespace;

/// The stamp that both tables contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub generation: u64,
    /// Digest of the view.
    pub digest: u128,
    /// Number of items that are deliberately not in the kernel.
    pub deviations: u32,
}

/// Reads the stamp, which both tables carry.
///
/// # Errors
/// A table or its stamp is missing, or the two differ.
pub fn stamp(namespace: &Namespace) -> Result<Stamp> {
    let (ipv4, ipv6) = (stamp_of(namespace, "ip")?, stamp_of(namespace, "ip6")?);
    ensure!(ipv4 == ipv6, "the stamps of the two tables differ: {ipv4:?} and {ipv6:?}");
    Ok(ipv4)
}

fn stamp_of(namespace: &Namespace, family: &str) -> Result<Stamp> {
    let text = namespace.output("nft", &["-j", "list", "map", family, "switchtower", "stamp"])?;
    let mut entries = [None; 2];
    for (key, value) in pairs(&objects(&text)?, "stamp")? {
        let index = key.as_u64().and_then(|key| usize::try_from(key).ok()).unwrap_or(usize::MAX);
        let address: Ipv6Addr = value.as_str().context("a stamp value is not a string")?.parse()?;
        if let Some(entry) = entries.get_mut(index) {
            *entry = Some(u128::from(address));
        }
    }
    let [Some(digest), Some(second)] = entries else { bail!("the stamp of table {family} is incomplete") };
    // The high 64 bits are the generation, the low 32 the deviations.
    let generation = u64::try_from(second >> 64)?;
    let deviations = u32::try_from(second & u128::from(u32::MAX))?;
    Ok(Stamp { generation, digest, deviations })
}

/// All elements of a map or set, as text, in no order.
///
/// # Errors
/// It cannot be listed.
pub fn elements(namespace: &Namespace, family: &str, set: &str) -> Result<BTreeSet<String>> {
    let text = namespace.output("nft", &["-j", "list", "map", family, "switchtower", set]);
    let text = match text {
        Ok(text) => text,
        Err(_) => namespace.output("nft", &["-j", "list", "set", family, "switchtower", set])?,
    };
    for object in objects(&text)? {
        let body = object.get("map").or_else(|| object.get("set"));
        if let Some(body) = body.filter(|body| body["name"] == set) {
            let elements = body["elem"].as_array().cloned().unwrap_or_default();
            return Ok(elements.iter().map(Value::to_string).collect());
        }
    }
    bail!("nft lists no {set}")
}

/// The whole table as `nft` prints it, for messages and for comparing before with after.
///
/// # Errors
/// It cannot be listed.
pub fn table(namespace: &Namespace, family: &str) -> Result<String> {
    namespace.output("nft", &["-nn", "list", "table", family, "switchtower"])
}

/// The number of the kernel's last change of any nf_tables object in the namespace: it grows by one with every
/// transaction, so that an equal number proves that nothing was written.
///
/// # Errors
/// The query fails.
pub fn transactions(namespace: &Namespace) -> Result<u32> {
    namespace.run(ask_generation)?
}

/// Sends NFT_MSG_GETGEN: `nft` does not print the generation.
fn ask_generation() -> Result<u32> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
    const GET_GENERATION: u16 = 10 << 8 | 16;
    // SAFETY: socket returns a new descriptor or -1, which is checked before it is owned.
    let socket = unsafe {
        let descriptor =
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
        ensure!(descriptor >= 0, "opening a netlink socket: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(descriptor)
    };
    let mut request = Vec::new();
    request.extend(20u32.to_ne_bytes());
    request.extend(GET_GENERATION.to_ne_bytes());
    request.extend(1u16.to_ne_bytes());
    request.extend([0; 12]);
    let mut answer = [0u8; 4096];
    // SAFETY: both buffers are valid for the lengths given.
    let length = unsafe {
        let sent = libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0);
        ensure!(sent >= 0, "asking for the generation: {}", std::io::Error::last_os_error());
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    let length = usize::try_from(length).context("no answer to the question for the generation")?;
    // Header 16 bytes, nfgenmsg 4, then the attribute NFTA_GEN_ID: length, type, u32 in network order.
    ensure!(length >= 28 && answer[22..24] == 1u16.to_ne_bytes(), "an unknown answer about the generation");
    Ok(u32::from_be_bytes([answer[24], answer[25], answer[26], answer[27]]))
}

fn objects(text: &str) -> Result<Vec<Value>> {
    let mut document: Value = serde_json::from_str(text).context("the output of nft -j")?;
    match document["nftables"].take() {
        Value::Array(objects) => Ok(objects),
        _ => bail!("nft -j printed no list"),
    }
}

fn pairs(objects: &[Value], map: &str) -> Result<Vec<(Value, Value)>> {
    let body = objects.iter().filter_map(|object| object.get("map")).find(|body| body["name"] == map);
    let body = body.with_context(|| format!("nft lists no map {map}"))?;
    let elements = body["elem"].as_array().cloned().unwrap_or_default();
    elements
        .into_iter()
        .map(|element| match element {
            Value::Array(mut pair) if pair.len() == 2 => {
                let value = pair.pop().unwrap_or_default();
                Ok((pair.pop().unwrap_or_default(), value))
            }
            other => bail!("an element of {map} is no pair: {other}"),
        })
        .collect()
}
