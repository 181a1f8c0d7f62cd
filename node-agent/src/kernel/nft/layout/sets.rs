//! The sets and maps of a table: their types as the kernel and nft know them.

use super::super::nfta;
use super::super::userdata::{ByteOrder, UserData};
use super::{FAMILY_IPV4, Layout, source_list_name};
use crate::kernel::netlink::wire::Writer;

/// Entries that the affinity map holds at most; beyond it new clients are balanced without being remembered. One
/// service port takes at most 2^15 of them, so that it takes 64 flooded ones to fill the map.
pub(super) const AFFINITY_SIZE: u32 = 1 << 21;

/// A type of keys or values: nft's number, which the kernel only stores, and the length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataType {
    pub(crate) number: u32,
    pub(crate) length: u32,
}

/// nft's numbers of data types (`enum datatypes`).
mod datatype {
    pub(super) const INTEGER: u32 = 4;
    pub(super) const IPV4_ADDRESS: u32 = 7;
    pub(super) const IPV6_ADDRESS: u32 = 8;
    pub(super) const PROTOCOL: u32 = 12;
    pub(super) const SERVICE: u32 = 13;
    pub(super) const MARK: u32 = 19;
    pub(super) const CLASSID: u32 = 23;
}

impl DataType {
    /// A transport protocol.
    pub(crate) const PROTOCOL: DataType = DataType { number: datatype::PROTOCOL, length: 1 };
    /// A frontend's value, the id of a backend or a pool: `meta priority` in host order.
    pub(crate) const VALUE: DataType = DataType { number: datatype::CLASSID, length: 4 };
    pub(crate) const VERDICT: DataType = DataType { number: libc::NFT_DATA_VERDICT, length: 16 };
    const VALUE_AND_INTEGER: DataType =
        DataType { number: concatenation(&[datatype::CLASSID, datatype::INTEGER]), length: 8 };
    const STAMP_KEY: DataType = DataType { number: datatype::MARK, length: 4 };
    const STAMP_VALUE: DataType = DataType { number: datatype::IPV6_ADDRESS, length: 16 };
}

/// A set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetSpec {
    pub(crate) name: String,
    /// `NFT_SET_*`.
    pub(crate) flags: u32,
    pub(crate) key: DataType,
    /// The type of a map's values.
    pub(crate) data: Option<DataType>,
    pub(crate) size: Option<u32>,
    /// Read by nft to print the set as it was declared.
    pub(crate) user_data: UserData,
}

impl SetSpec {
    /// Writes the attributes of `NFT_MSG_NEWSET`; `id` identifies the set within its batch.
    pub(crate) fn encode(&self, writer: &mut Writer, table: &str, id: u32) {
        use nfta::{set, set_description};
        writer.string(set::TABLE, table);
        writer.string(set::NAME, &self.name);
        writer.number(set::FLAGS, self.flags);
        writer.number(set::KEY_TYPE, self.key.number);
        writer.number(set::KEY_LENGTH, self.key.length);
        if let Some(data) = self.data {
            writer.number(set::DATA_TYPE, data.number);
            writer.number(set::DATA_LENGTH, data.length);
        }
        writer.nest(set::DESCRIPTION, |writer| {
            if let Some(size) = self.size {
                writer.number(set_description::SIZE, size);
            }
        });
        writer.number(set::ID, id);
        writer.attribute(set::USER_DATA, &self.user_data.0);
    }
}

/// Returns the number of a concatenation of data types: 6 bits per field.
const fn concatenation(fields: &[u32]) -> u32 {
    let (mut number, mut index) = (0, 0);
    while index < fields.len() {
        number = number << 6 | fields[index];
        index += 1;
    }
    number
}

/// A map from values in host order.
fn from_host(data: ByteOrder) -> UserData {
    UserData::map(ByteOrder::Host, data).single_values()
}

/// A set of concatenations.
fn concatenated() -> UserData {
    UserData::set(ByteOrder::Unspecified).key_typeof(&UserData::concatenation(&[]))
}

/// A map from concatenations to values in host order.
fn concatenated_to_host() -> UserData {
    UserData::map(ByteOrder::Unspecified, ByteOrder::Host)
        .key_typeof(&UserData::concatenation(&[]))
        .single_values()
}

/// A map from values in host order to concatenations.
fn host_to_concatenated() -> UserData {
    UserData::map(ByteOrder::Host, ByteOrder::Unspecified)
        .data_typeof(&UserData::concatenation(&[]))
        .single_values()
}

/// `typeof meta priority . numgen random mod 65536 : meta priority`, without which the key has no name. `affinity` has
/// it too, since nft 1.0.6 does not read a `typeof` with `jhash` back.
fn value_and_number() -> UserData {
    let priority = UserData::meta(libc::NFT_META_PRIORITY);
    let key = UserData::concatenation(&[priority.clone(), UserData::random(1 << 16)]);
    UserData::map(ByteOrder::Unspecified, ByteOrder::Host)
        .key_typeof(&key)
        .data_typeof(&priority)
        .single_values()
}

impl Layout {
    fn address_number(self) -> u32 {
        if self.family == FAMILY_IPV4 { datatype::IPV4_ADDRESS } else { datatype::IPV6_ADDRESS }
    }

    fn address(self) -> DataType {
        DataType { number: self.address_number(), length: self.length }
    }

    /// Address, protocol, port.
    fn frontend(self) -> DataType {
        let fields = [self.address_number(), datatype::PROTOCOL, datatype::SERVICE];
        DataType { number: concatenation(&fields), length: self.length + 8 }
    }

    /// Address, port.
    fn endpoint(self) -> DataType {
        let fields = [self.address_number(), datatype::SERVICE];
        DataType { number: concatenation(&fields), length: self.length + 4 }
    }

    /// Address of the client, then address, protocol and port of the endpoint.
    fn hairpin(self) -> DataType {
        let address = self.address_number();
        let fields = [address, address, datatype::PROTOCOL, datatype::SERVICE];
        DataType { number: concatenation(&fields), length: 2 * self.length + 8 }
    }

    /// The sets and maps that always exist.
    pub(crate) fn sets(self) -> Vec<SetSpec> {
        let value = DataType::VALUE;
        let mut sets: Vec<SetSpec> = ["frontends", "inside", "outside", "guarded"]
            .map(|name| map(name, self.frontend(), value, concatenated_to_host()))
            .to_vec();
        sets.extend([
            map("slots", DataType::VALUE_AND_INTEGER, value, value_and_number()),
            map("backends", value, self.endpoint(), host_to_concatenated()),
            map("sticky_cluster", value, self.endpoint(), host_to_concatenated()),
            map("sticky_local", value, self.endpoint(), host_to_concatenated()),
            map("sticky_pools", value, value, from_host(ByteOrder::Host)),
            map("source_lists", value, DataType::VERDICT, from_host(ByteOrder::Unspecified)),
            SetSpec {
                flags: (libc::NFT_SET_MAP | libc::NFT_SET_TIMEOUT | libc::NFT_SET_EVAL) as u32,
                size: Some(AFFINITY_SIZE),
                ..map("affinity", DataType::VALUE_AND_INTEGER, value, value_and_number())
            },
            map("stamp", DataType::STAMP_KEY, DataType::STAMP_VALUE, from_host(ByteOrder::Network)),
            self.addresses("vips", 0),
            self.addresses("cluster_ips", 0),
            self.addresses("service_cidrs", libc::NFT_SET_INTERVAL),
            self.addresses("local_pods", libc::NFT_SET_INTERVAL),
            set("refused", self.frontend(), concatenated()),
            set("refused_node_ports", self.frontend(), concatenated()),
            set("hairpin", self.hairpin(), concatenated()),
        ]);
        sets
    }

    fn addresses(self, name: &str, flags: i32) -> SetSpec {
        SetSpec { flags: flags as u32, ..set(name, self.address(), UserData::set(ByteOrder::Network)) }
    }

    /// The set of one list of sources.
    pub(crate) fn source_list(self, list: u32) -> SetSpec {
        self.addresses(&source_list_name(list), libc::NFT_SET_INTERVAL)
    }
}

fn set(name: &str, key: DataType, user_data: UserData) -> SetSpec {
    SetSpec { name: name.to_owned(), flags: 0, key, data: None, size: None, user_data }
}

fn map(name: &str, key: DataType, data: DataType, user_data: UserData) -> SetSpec {
    SetSpec { flags: libc::NFT_SET_MAP as u32, data: Some(data), ..set(name, key, user_data) }
}
