//! The sets and maps of a table: their types as the kernel and nft know them.

use super::{FAMILY_IPV4, Layout, source_list_name};

/// Entries that the affinity map holds at most; beyond it new clients are balanced without being remembered. One
/// service port takes at most 2^15 of them, so that it takes 64 flooded ones to fill the map.
pub(super) const AFFINITY_SIZE: u32 = 1 << 21;

/// A set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetSpec {
    pub(crate) name: String,
    pub(crate) flags: u32,
    /// nft's type number and length in bytes.
    pub(crate) key: (u32, u32),
    /// The same of a map's value.
    pub(crate) data: Option<(u32, u32)>,
    pub(crate) size: Option<u32>,
    /// What nft needs to print the set as it was declared.
    pub(crate) user_data: &'static [u8],
}

/// nft's numbers of data types; a concatenation has 6 bits per field.
const IPV6: u32 = 8;
const PROTOCOL: u32 = 12;
const SERVICE: u32 = 13;
const MARK: u32 = 19;
const CLASSID: u32 = 23;
const INTEGER: u32 = 4;
const VERDICT: u32 = 0xffff_ff00;

const FLAG_INTERVAL: u32 = 4;
const FLAG_MAP: u32 = 8;
const FLAG_TIMEOUT: u32 = 0x10;
const FLAG_DYNAMIC: u32 = 0x20;

// User data of sets, as nft 1.0.6 writes it: the sets were declared in a file, loaded, and the attribute was read
// back by a netlink dump. All but SLOTS say only byte orders; SLOTS holds the `typeof` of key and value
// (`typeof meta priority . numgen random mod 65536 : meta priority`), without which the key has no name. It serves
// for `affinity` too: nft 1.0.6 does not read a `typeof` with `jhash` back.
const HOST_TO_NETWORK: &[u8] = &[0, 4, 1, 0, 0, 0, 1, 4, 2, 0, 0, 0, 6, 4, 0, 0, 0, 0];
const HOST_TO_HOST: &[u8] = &[0, 4, 1, 0, 0, 0, 1, 4, 1, 0, 0, 0, 6, 4, 0, 0, 0, 0];
const CONCATENATION_TO_HOST: &[u8] =
    &[0, 4, 0, 0, 0, 0, 1, 4, 1, 0, 0, 0, 3, 8, 0, 4, 13, 0, 0, 0, 1, 0, 6, 4, 0, 0, 0, 0];
const HOST_TO_CONCATENATION: &[u8] =
    &[0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 0, 0, 4, 8, 0, 4, 13, 0, 0, 0, 1, 0, 6, 4, 0, 0, 0, 0];
const NETWORK_ORDER: &[u8] = &[0, 4, 2, 0, 0, 0];
const CONCATENATION: &[u8] = &[0, 4, 0, 0, 0, 0, 3, 8, 0, 4, 13, 0, 0, 0, 1, 0];
const HOST_TO_VERDICT: &[u8] = &[0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 0, 0, 6, 4, 0, 0, 0, 0];
const SLOTS: &[u8] = &[
    0, 4, 0, 0, 0, 0, 1, 4, 1, 0, 0, 0, 3, 0x34, 0, 4, 13, 0, 0, 0, 1, 0x2c, 0, 14, 0, 4, 9, 0, 0, 0, 1, 6,
    0, 4, 2, 0, 0, 0, 1, 0x1a, 0, 4, 0x17, 0, 0, 0, 1, 0x12, 0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 1, 0, 2, 4, 0, 0,
    0, 0, 4, 14, 0, 4, 9, 0, 0, 0, 1, 6, 0, 4, 2, 0, 0, 0, 6, 4, 0, 0, 0, 0,
];

fn concatenation(types: &[u32]) -> u32 {
    types.iter().fold(0, |number, kind| number << 6 | kind)
}

impl Layout {
    fn address_type(self) -> u32 {
        if self.family == FAMILY_IPV4 { 7 } else { IPV6 }
    }

    /// The sets and maps that always exist.
    pub(crate) fn sets(self) -> Vec<SetSpec> {
        let (address, length) = (self.address_type(), self.length);
        let frontend = (concatenation(&[address, PROTOCOL, SERVICE]), length + 8);
        let endpoint = (concatenation(&[address, SERVICE]), length + 4);
        let map = |name: &str, key, data, user_data| SetSpec {
            name: name.to_owned(),
            flags: FLAG_MAP,
            key,
            data: Some(data),
            size: None,
            user_data,
        };
        let set = |name: &str, flags, key, user_data| SetSpec {
            name: name.to_owned(),
            flags,
            key,
            data: None,
            size: None,
            user_data,
        };
        let value = (CLASSID, 4);
        let mut sets: Vec<SetSpec> = ["frontends", "inside", "outside", "guarded"]
            .map(|name| map(name, frontend, value, CONCATENATION_TO_HOST))
            .to_vec();
        sets.extend([
            map("slots", (concatenation(&[CLASSID, INTEGER]), 8), value, SLOTS),
            map("backends", value, endpoint, HOST_TO_CONCATENATION),
            map("sticky_cluster", value, endpoint, HOST_TO_CONCATENATION),
            map("sticky_local", value, endpoint, HOST_TO_CONCATENATION),
            map("sticky_pools", value, value, HOST_TO_HOST),
            map("source_lists", value, (VERDICT, 16), HOST_TO_VERDICT),
            SetSpec {
                flags: FLAG_MAP | FLAG_TIMEOUT | FLAG_DYNAMIC,
                size: Some(AFFINITY_SIZE),
                ..map("affinity", (concatenation(&[CLASSID, INTEGER]), 8), value, SLOTS)
            },
            map("stamp", (MARK, 4), (IPV6, 16), HOST_TO_NETWORK),
            set("vips", 0, (address, length), NETWORK_ORDER),
            set("cluster_ips", 0, (address, length), NETWORK_ORDER),
            set("service_cidrs", FLAG_INTERVAL, (address, length), NETWORK_ORDER),
            set("local_pods", FLAG_INTERVAL, (address, length), NETWORK_ORDER),
            set("refused", 0, frontend, CONCATENATION),
            set("refused_node_ports", 0, frontend, CONCATENATION),
            set(
                "hairpin",
                0,
                (concatenation(&[address, address, PROTOCOL, SERVICE]), 2 * length + 8),
                CONCATENATION,
            ),
        ]);
        sets
    }

    /// The set of one list of sources.
    pub(crate) fn source_list(self, list: u32) -> SetSpec {
        SetSpec {
            name: source_list_name(list),
            flags: FLAG_INTERVAL,
            key: (self.address_type(), self.length),
            data: None,
            size: None,
            user_data: NETWORK_ORDER,
        }
    }
}
