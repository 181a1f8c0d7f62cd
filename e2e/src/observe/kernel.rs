//! Reads a node's kernel through `nft` and the crate `nftables`, sharing no code with the agent that wrote the rules.
//!
//! The crate's schema (0.6.3) expresses our sets and the map `stamp`. It cannot parse the other maps:
//! - keys and values of type `classid` (nftables-rs issue 224): `frontends`, `inside`, `outside`, `guarded`, `slots`,
//!   `affinity`, and the maps of the pools;
//! - concatenated values (issue 207): `backends` and the sticky maps;
//! - verdicts as values (issue 237): `source_lists`.
//!
//! [`map_elements`] therefore reads maps as `nft` prints them, which suffices to compare states.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use anyhow::{Context as _, Result, bail, ensure};
use nftables::expr::Expression;
use nftables::helper::{DEFAULT_NFT, get_current_ruleset_with_args};
use nftables::schema::{Map, NfListObject, NfObject, Set};

use crate::lab::namespace::Namespace;

const TABLE: &str = "switchtower";

/// The stamp that both tables contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub generation: u64,
    /// Digest of the view.
    pub digest: u128,
    /// Number of items that are deliberately not in the kernel.
    pub deviations: u32,
}

/// Reads the stamp, which both tables contain.
///
/// # Errors
/// A table or its stamp is missing, or the stamps differ.
pub fn stamp(namespace: &Namespace) -> Result<Stamp> {
    let stamp_of = |family| -> Result<Stamp> {
        let listed = list(namespace, &["list", "map", family, TABLE, "stamp"])?;
        let map = listed.iter().find_map(|object| match object {
            NfObject::ListObject(NfListObject::Map(map)) => Some(map),
            _ => None,
        });
        parse_stamp(map.context("nft lists no map stamp")?).with_context(|| format!("table {family}"))
    };
    let (ipv4, ipv6) = (stamp_of("ip")?, stamp_of("ip6")?);
    ensure!(ipv4 == ipv6, "the stamps of the two tables differ: {ipv4:?} and {ipv6:?}");
    Ok(ipv4)
}

fn parse_stamp(map: &Map<'_>) -> Result<Stamp> {
    let mut entries = [None; 2];
    for element in map.elem.iter().flat_map(|elements| elements.iter()) {
        let Expression::List(pair) = element else { bail!("{element:?} is not a pair") };
        let [Expression::Number(key), Expression::String(value)] = pair.as_slice() else {
            bail!("{pair:?} is not a number and an address");
        };
        if let Some(entry) = usize::try_from(*key).ok().and_then(|key| entries.get_mut(key)) {
            *entry = Some(u128::from(value.parse::<Ipv6Addr>()?));
        }
    }
    let [Some(digest), Some(second)] = entries else { bail!("the stamp is incomplete") };
    // The high 64 bits are the generation, the low 32 the deviations.
    let generation = u64::try_from(second >> 64)?;
    let deviations = u32::try_from(second & u128::from(u32::MAX))?;
    Ok(Stamp { generation, digest, deviations })
}

/// All elements of a set, unordered.
///
/// # Errors
/// The set cannot be listed.
pub fn set_elements(namespace: &Namespace, family: &str, set: &str) -> Result<BTreeSet<String>> {
    let listed = list(namespace, &["list", "set", family, TABLE, set])?;
    let found = listed.iter().find_map(|object| match object {
        NfObject::ListObject(NfListObject::Set(set)) => Some(set),
        _ => None,
    });
    let found: &Set<'_> = found.with_context(|| format!("nft lists no set {set}"))?;
    Ok(found.elem.iter().flat_map(|elements| elements.iter()).map(|element| format!("{element:?}")).collect())
}

/// All elements of a map as `nft` prints them, unordered.
///
/// # Errors
/// The map cannot be listed.
pub fn map_elements(namespace: &Namespace, family: &str, map: &str) -> Result<BTreeSet<String>> {
    let text = namespace.output("nft", &["-nn", "list", "map", family, TABLE, map])?;
    Ok(printed_elements(&text))
}

fn printed_elements(text: &str) -> BTreeSet<String> {
    let elements = text.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
    let elements = elements.map_or("", |(elements, _)| elements).split(',').map(str::trim);
    elements.filter(|element| !element.is_empty()).map(str::to_owned).collect()
}

fn list(namespace: &Namespace, arguments: &[&str]) -> Result<Vec<NfObject<'static>>> {
    let listed = namespace.run(|| get_current_ruleset_with_args(DEFAULT_NFT, arguments.iter().copied()))?;
    Ok(listed.with_context(|| format!("nft {}", arguments.join(" ")))?.objects.into_owned())
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

#[cfg(test)]
mod tests {
    use nftables::schema::Nftables;

    use super::*;

    #[test]
    fn stamp_parsed_from_nft_output() {
        let text = r#"{"nftables": [{"map": {"family": "ip", "name": "stamp", "table": "switchtower",
            "type": "mark", "handle": 132, "map": "ipv6_addr",
            "elem": [[0, "::2a:0:0:0:7"], [1, "::2a:4:0:0:3"], [2, "::1"]]}}]}"#;
        let listed: Nftables<'_> = serde_json::from_str(text).unwrap();
        let NfObject::ListObject(NfListObject::Map(map)) = &listed.objects[0] else { panic!("{listed:?}") };
        let stamp = parse_stamp(map).unwrap();
        assert_eq!(stamp, Stamp { generation: 0x2a, digest: (0x2a << 64) | 7, deviations: 3 });
    }

    #[test]
    fn printed_elements_split_across_lines() {
        let text = "map backends {\n type classid : ipv4_addr . inet_service\n elements = { 8000:0 : 10.0.0.1 . 80,\n \
             8000:1 : 10.0.0.2 . 80 }\n}";
        let expected = ["8000:0 : 10.0.0.1 . 80", "8000:1 : 10.0.0.2 . 80"];
        assert_eq!(printed_elements(text), expected.map(str::to_owned).into());
        assert!(printed_elements("map backends {\n}").is_empty());
    }
}
