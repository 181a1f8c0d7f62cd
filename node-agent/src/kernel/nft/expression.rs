//! nf_tables expressions: the parts of a rule as values, and their encoding.
//!
//! Registers are counted in words of 32 bits from 0; a field of a concatenation starts at a multiple of 4
//! bytes. Names and numbers are those of the kernel's `linux/netfilter/nf_tables.h`.

use super::batch::Batch;
use super::data::{Verdict, write_value};
use super::layout::{DataType, SetSpec};
use super::nfta;
use super::userdata::{ByteOrder, UserData};
use crate::kernel::netlink::wire::Writer;

/// Scratch register of our rules: `meta priority`.
pub(crate) const META_PRIORITY: u32 = libc::NFT_META_PRIORITY as u32;
pub(crate) const META_MARK: u32 = libc::NFT_META_MARK as u32;
pub(crate) const META_INTERFACE: u32 = libc::NFT_META_IIFNAME as u32;
pub(crate) const META_OUTPUT_INTERFACE: u32 = libc::NFT_META_OIFNAME as u32;
pub(crate) const META_PROTOCOL: u32 = libc::NFT_META_L4PROTO as u32;
pub(crate) const CT_STATE: u32 = libc::NFT_CT_STATE as u32;
pub(crate) const CT_STATUS: u32 = libc::NFT_CT_STATUS as u32;
pub(crate) const NETWORK: u32 = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
pub(crate) const TRANSPORT: u32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32;

/// The operation on a dynamic map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DynamicOperation {
    Update,
    Delete,
}

/// Destination of a map's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum LookupResult {
    /// The value goes to this register.
    Value(u32),
    /// The value is a verdict, which takes effect.
    Verdict,
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Expression {
    LoadMeta {
        key: u32,
        register: u32,
    },
    SetMeta {
        key: u32,
        register: u32,
    },
    LoadPayload {
        base: u32,
        offset: u32,
        length: u32,
        register: u32,
    },
    LoadConntrack {
        key: u32,
        register: u32,
    },
    /// Type of the source address, for example local to this host: `fib saddr type`.
    LoadSourceType {
        register: u32,
    },
    /// register = (register & mask) ^ xor, in host order.
    Bitwise {
        register: u32,
        mask: u32,
        xor: u32,
    },
    Compare {
        equal: bool,
        register: u32,
        data: Vec<u8>,
    },
    Immediate {
        register: u32,
        value: u32,
    },
    Random {
        register: u32,
        modulus: u32,
    },
    /// register = jhash of the `length` bytes that begin there, modulo `modulus`.
    Hash {
        register: u32,
        length: u32,
        modulus: u32,
        seed: u32,
    },
    /// Tests membership in a set, or with `result` looks a key up in a map.
    Lookup {
        set: String,
        register: u32,
        result: Option<LookupResult>,
    },
    /// `meta l4proto { tcp, udp, sctp }`. nft needs it to read a rule with `dnat … : port` back.
    ProtocolWithPorts {
        register: u32,
    },
    /// `vmap { code : verdict, … }` on a value of 32 bits.
    Dispatch {
        register: u32,
        verdicts: Vec<(u32, Verdict)>,
    },
    Dynamic {
        operation: DynamicOperation,
        set: String,
        key: u32,
        data: u32,
        seconds: u32,
    },
    DestinationNat {
        family: u8,
        address: u32,
        port: u32,
    },
    /// `masquerade fully-random`.
    Masquerade,
    /// `redirect`: to this host, on the same port.
    Redirect,
    /// `reject` with ICMP port unreachable; the code differs per family.
    Reject {
        code: u8,
    },
    Verdict(Verdict),
}

fn register(number: u32) -> u32 {
    libc::NFT_REG32_00 as u32 + number
}

/// An anonymous set of a rule, written before it.
struct Anonymous {
    id: u32,
    name: &'static str,
}

/// An element of an anonymous set: its key and, in a map, its verdict.
struct AnonymousElement<'a> {
    key: Vec<u8>,
    verdict: Option<&'a Verdict>,
}

/// Returns the declaration and the elements of the anonymous set that an expression needs, if any.
fn anonymous_set(expression: &Expression) -> Option<(&'static str, SetSpec, Vec<AnonymousElement<'_>>)> {
    let constant = (libc::NFT_SET_ANONYMOUS | libc::NFT_SET_CONSTANT) as u32;
    let (name, flags, key, data, user_data, elements) = match expression {
        Expression::ProtocolWithPorts { .. } => {
            let protocols = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP];
            let element = |protocol| AnonymousElement { key: vec![protocol as u8], verdict: None };
            let user_data =
                UserData::set(ByteOrder::Host).key_typeof(&UserData::meta(libc::NFT_META_L4PROTO));
            ("__set%d", constant, DataType::PROTOCOL, None, user_data, protocols.map(element).into())
        }
        Expression::Dispatch { verdicts, .. } => {
            let user_data = UserData::map(ByteOrder::Host, ByteOrder::Unspecified)
                .data_typeof(&UserData::verdict())
                .single_values();
            let flags = constant | libc::NFT_SET_MAP as u32;
            let elements = verdicts.iter().map(|(code, verdict)| AnonymousElement {
                key: code.to_ne_bytes().to_vec(),
                verdict: Some(verdict),
            });
            let elements = elements.collect();
            ("__map%d", flags, DataType::VALUE, Some(DataType::VERDICT), user_data, elements)
        }
        _ => return None,
    };
    let elements: Vec<AnonymousElement<'_>> = elements;
    let size = Some(elements.len() as u32);
    Some((name, SetSpec { name: name.to_owned(), flags, key, data, size, user_data }, elements))
}

/// Writes the anonymous set that an expression needs, if any, into the batch.
fn anonymous(expression: &Expression, batch: &mut Batch, family: u8, table: &str) -> Option<Anonymous> {
    let (name, spec, elements) = anonymous_set(expression)?;
    let id = batch.set_id();
    batch.push(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, family, |writer| spec.encode(writer, table, id));
    batch.push(libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, family, |writer| {
        writer.string(nfta::element_list::TABLE, table);
        writer.string(nfta::element_list::SET, name);
        writer.nest(nfta::element_list::ELEMENTS, |writer| {
            for AnonymousElement { key, verdict } in &elements {
                writer.nest(nfta::list::ENTRY, |writer| {
                    write_value(writer, nfta::element::KEY, key);
                    if let Some(verdict) = verdict {
                        writer.nest(nfta::element::DATA, |writer| verdict.encode(writer));
                    }
                });
            }
        });
        writer.number(nfta::element_list::SET_ID, id);
    });
    Some(Anonymous { id, name })
}

/// Writes an expression of this kind; `body` writes its attributes.
fn expression(writer: &mut Writer, kind: &str, body: impl FnOnce(&mut Writer)) {
    writer.nest(nfta::list::ENTRY, |writer| {
        writer.string(nfta::expression::NAME, kind);
        writer.nest(nfta::expression::DATA, body);
    });
}

/// Writes an expression whose attributes are all numbers.
fn numbers(writer: &mut Writer, kind: &str, attributes: &[(u16, u32)]) {
    expression(writer, kind, |writer| {
        attributes.iter().for_each(|(attribute, value)| writer.number(*attribute, *value));
    });
}

impl Expression {
    fn encode(&self, writer: &mut Writer, set: Option<&Anonymous>) {
        match self {
            Expression::Lookup { .. }
            | Expression::ProtocolWithPorts { .. }
            | Expression::Dispatch { .. } => {
                expression(writer, "lookup", |writer| self.encode_lookup(writer, set));
            }
            Expression::Dynamic { .. } => self.encode_dynamic(writer),
            Expression::Verdict(verdict) => expression(writer, "immediate", |writer| {
                writer.number(nfta::immediate::DESTINATION, libc::NFT_REG_VERDICT as u32);
                writer.nest(nfta::immediate::DATA, |writer| verdict.encode(writer));
            }),
            Expression::DestinationNat { .. }
            | Expression::Masquerade
            | Expression::Redirect
            | Expression::Reject { .. } => {
                self.encode_action(writer);
            }
            Expression::Bitwise { .. } | Expression::Compare { .. } | Expression::Immediate { .. } => {
                self.encode_operation(writer);
            }
            _ => self.encode_load(writer),
        }
    }

    /// Expressions that move a number between a register and the packet or its metadata.
    fn encode_load(&self, writer: &mut Writer) {
        use nfta::{ct, fib, hash, meta, numgen, payload};
        match self {
            Expression::LoadMeta { key, register: to } => {
                numbers(writer, "meta", &[(meta::KEY, *key), (meta::DESTINATION, register(*to))]);
            }
            Expression::SetMeta { key, register: from } => {
                numbers(writer, "meta", &[(meta::KEY, *key), (meta::SOURCE, register(*from))]);
            }
            Expression::LoadPayload { base, offset, length, register: to } => {
                let place = [(payload::BASE, *base), (payload::OFFSET, *offset), (payload::LENGTH, *length)];
                let [base, offset, length] = place;
                numbers(writer, "payload", &[(payload::DESTINATION, register(*to)), base, offset, length]);
            }
            Expression::LoadConntrack { key, register: to } => {
                numbers(writer, "ct", &[(ct::DESTINATION, register(*to)), (ct::KEY, *key)]);
            }
            Expression::LoadSourceType { register: to } => {
                let result = (fib::RESULT, nfta::FIB_ADDRESS_TYPE);
                let flags = (fib::FLAGS, nfta::FIB_SOURCE_ADDRESS);
                numbers(writer, "fib", &[flags, result, (fib::DESTINATION, register(*to))]);
            }
            Expression::Random { register: to, modulus } => {
                let random = (numgen::TYPE, libc::NFT_NG_RANDOM as u32);
                let (to, modulus) = ((numgen::DESTINATION, register(*to)), (numgen::MODULUS, *modulus));
                numbers(writer, "numgen", &[to, modulus, random, (numgen::OFFSET, 0)]);
            }
            Expression::Hash { register: both, length, modulus, seed } => {
                let attributes = [
                    (hash::SOURCE, register(*both)),
                    (hash::DESTINATION, register(*both)),
                    (hash::LENGTH, *length),
                    (hash::MODULUS, *modulus),
                    (hash::SEED, *seed),
                    (hash::TYPE, nfta::HASH_JENKINS),
                ];
                numbers(writer, "hash", &attributes);
            }
            _ => {}
        }
    }

    /// Expressions on the content of registers.
    fn encode_operation(&self, writer: &mut Writer) {
        use nfta::{bitwise, compare, immediate};
        match self {
            Expression::Bitwise { register: both, mask, xor } => expression(writer, "bitwise", |writer| {
                writer.number(bitwise::SOURCE, register(*both));
                writer.number(bitwise::DESTINATION, register(*both));
                writer.number(bitwise::LENGTH, size_of::<u32>() as u32);
                write_value(writer, bitwise::MASK, &mask.to_ne_bytes());
                write_value(writer, bitwise::XOR, &xor.to_ne_bytes());
            }),
            Expression::Compare { equal, register: from, data } => expression(writer, "cmp", |writer| {
                let operation = if *equal { libc::NFT_CMP_EQ } else { libc::NFT_CMP_NEQ };
                writer.number(compare::SOURCE, register(*from));
                writer.number(compare::OPERATION, operation as u32);
                write_value(writer, compare::DATA, data);
            }),
            Expression::Immediate { register: to, value } => expression(writer, "immediate", |writer| {
                writer.number(immediate::DESTINATION, register(*to));
                write_value(writer, immediate::DATA, &value.to_ne_bytes());
            }),
            _ => {}
        }
    }

    /// Expressions that decide about the packet.
    fn encode_action(&self, writer: &mut Writer) {
        use nfta::{masquerade, nat, reject};
        match self {
            Expression::DestinationNat { family, address, port } => {
                let attributes = [
                    (nat::TYPE, libc::NFT_NAT_DNAT as u32),
                    (nat::FAMILY, u32::from(*family)),
                    (nat::ADDRESS, register(*address)),
                    (nat::PORT, register(*port)),
                ];
                numbers(writer, "nat", &attributes);
            }
            Expression::Masquerade => numbers(writer, "masq", &[(masquerade::FLAGS, nfta::RANDOM_FULLY)]),
            Expression::Redirect => expression(writer, "redir", |_| {}),
            Expression::Reject { code } => expression(writer, "reject", |writer| {
                writer.number(reject::TYPE, libc::NFT_REJECT_ICMP_UNREACH as u32);
                writer.attribute(reject::CODE, &[*code]);
            }),
            _ => {}
        }
    }

    fn encode_dynamic(&self, writer: &mut Writer) {
        use nfta::dynset;
        let Expression::Dynamic { operation, set, key, data, seconds } = self else { return };
        let operation = match operation {
            DynamicOperation::Update => libc::NFT_DYNSET_OP_UPDATE as u32,
            DynamicOperation::Delete => nfta::DYNSET_DELETE,
        };
        expression(writer, "dynset", |writer| {
            writer.number(dynset::KEY, register(*key));
            writer.number(dynset::DATA, register(*data));
            writer.number(dynset::OPERATION, operation);
            if *seconds > 0 {
                let milliseconds = u64::from(*seconds) * 1000;
                writer.attribute(dynset::TIMEOUT, &milliseconds.to_be_bytes());
            }
            writer.string(dynset::SET, set);
        });
    }

    fn encode_lookup(&self, writer: &mut Writer, anonymous: Option<&Anonymous>) {
        use nfta::lookup;
        match self {
            Expression::Lookup { set, register: from, result } => {
                writer.string(lookup::SET, set);
                writer.number(lookup::SOURCE, register(*from));
                match result {
                    None => {}
                    Some(LookupResult::Verdict) => {
                        writer.number(lookup::DESTINATION, libc::NFT_REG_VERDICT as u32);
                    }
                    Some(LookupResult::Value(to)) => writer.number(lookup::DESTINATION, register(*to)),
                }
            }
            Expression::ProtocolWithPorts { register: from }
            | Expression::Dispatch { register: from, .. } => {
                writer.string(lookup::SET, anonymous.map_or("", |set| set.name));
                writer.number(lookup::SOURCE, register(*from));
                if matches!(self, Expression::Dispatch { .. }) {
                    writer.number(lookup::DESTINATION, libc::NFT_REG_VERDICT as u32);
                }
                writer.number(lookup::SET_ID, anonymous.map_or(0, |set| set.id));
            }
            _ => {}
        }
    }
}

/// A rule: its expressions in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Rule(pub(crate) Vec<Expression>);

/// Type of our entry in a rule's user data. nft knows 0 (comment) and skips what it does not know.
const FINGERPRINT: u8 = 0x53;
/// Attribute type of a code in the bytes that a fingerprint covers.
const FINGERPRINT_CODE: u16 = 1;

impl Rule {
    /// Returns the hash of the rule's content, which the kernel stores with the rule: rules cannot be changed, only
    /// replaced, so a chain whose rules have the right fingerprints in the right order is the chain that we wrote.
    pub(crate) fn fingerprint(&self, family: u8) -> u64 {
        let mut writer = Writer::default();
        for expression in &self.0 {
            expression.encode(&mut writer, None);
            if let Expression::Dispatch { verdicts, .. } = expression {
                for (code, verdict) in verdicts {
                    writer.number(FINGERPRINT_CODE, *code);
                    verdict.encode(&mut writer);
                }
            }
        }
        writer.bytes.push(family);
        let hash = blake3::hash(&writer.bytes);
        u64::from_le_bytes(std::array::from_fn(|index| hash.as_bytes()[index]))
    }

    /// Appends the rule to the end of a chain.
    pub(crate) fn append(&self, batch: &mut Batch, family: u8, table: &str, chain: &str) {
        let sets: Vec<Option<Anonymous>> =
            self.0.iter().map(|expression| anonymous(expression, batch, family, table)).collect();
        let user_data = UserData::default().bytes(FINGERPRINT, &self.fingerprint(family).to_le_bytes());
        batch.push(libc::NFT_MSG_NEWRULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, family, |writer| {
            writer.string(nfta::rule::TABLE, table);
            writer.string(nfta::rule::CHAIN, chain);
            writer.nest(nfta::rule::EXPRESSIONS, |writer| {
                for (expression, set) in self.0.iter().zip(&sets) {
                    expression.encode(writer, set.as_ref());
                }
            });
            writer.attribute(nfta::rule::USER_DATA, &user_data.0);
        });
    }
}

/// Returns the fingerprint in a rule's user data; `None` if the rule is foreign.
pub(crate) fn fingerprint_of(user_data: &[u8]) -> Option<u64> {
    let value = user_data.strip_prefix(&[FINGERPRINT, size_of::<u64>() as u8])?;
    Some(u64::from_le_bytes(value.try_into().ok()?))
}
