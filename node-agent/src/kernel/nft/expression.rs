//! nf_tables expressions: the parts of a rule as values, and their encoding.
//!
//! Registers are counted in words of 32 bits from 0; a field of a concatenation starts at a multiple of 4
//! bytes. Names and numbers are those of the kernel's `linux/netfilter/nf_tables.h`.

use super::netlink::{Batch, CREATE, NEW_ELEMENT, NEW_SET};
use super::wire::Writer;

/// `NFT_REG32_00`: the first register.
const FIRST_REGISTER: u32 = 8;
/// `NFT_META_PRIORITY`, the scratch register of our rules.
pub(crate) const META_PRIORITY: u32 = 2;
/// `NFT_META_MARK`.
pub(crate) const META_MARK: u32 = 3;
/// `NFT_META_IIFNAME`.
pub(crate) const META_INTERFACE: u32 = 6;
/// `NFT_META_L4PROTO`.
pub(crate) const META_PROTOCOL: u32 = 16;
/// `NFT_CT_STATE`.
pub(crate) const CT_STATE: u32 = 0;
/// `NFT_CT_STATUS`.
pub(crate) const CT_STATUS: u32 = 2;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
pub(crate) const NETWORK: u32 = 1;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`.
pub(crate) const TRANSPORT: u32 = 2;

/// What a rule decides.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    fn code(&self) -> i32 {
        match self {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Jump(_) => -3,
            Verdict::Goto(_) => -4,
            Verdict::Return => -5,
        }
    }

    /// Writes the content of an `NFTA_*_DATA` attribute.
    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.nest(2, |writer| {
            writer.number(1, self.code() as u32);
            if let Verdict::Jump(chain) | Verdict::Goto(chain) = self {
                writer.string(2, chain);
            }
        });
    }
}

/// What a dynamic map's update does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DynamicOperation {
    Update,
    Delete,
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
    /// Whether the source is an address of this host: `fib saddr type`.
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
    /// A set's membership test, or with `result` a map's value; `Some(None)` is the verdict.
    Lookup {
        set: String,
        register: u32,
        result: Option<Option<u32>>,
    },
    /// `meta l4proto { tcp, udp, sctp }`. The rule of a `dnat … : port` must say it for nft to read it back.
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
    /// `reject` with ICMP port unreachable; the code differs per family.
    Reject {
        code: u8,
    },
    Verdict(Verdict),
}

fn register(number: u32) -> u32 {
    FIRST_REGISTER + number
}

/// An anonymous set of a rule, written before it.
struct Anonymous {
    id: u32,
    name: &'static str,
}

/// Key and, in a map, verdict of each element of an anonymous set.
type AnonymousElements<'a> = Vec<(Vec<u8>, Option<&'a Verdict>)>;

/// Writes the anonymous set that an expression needs, if any, into the batch.
fn anonymous(expression: &Expression, batch: &mut Batch, family: u8, table: &str) -> Option<Anonymous> {
    // User data as nft 1.0.6 writes it for these two sets; nft needs it to print them.
    const PROTOCOLS: [u8; 22] = [0, 4, 1, 0, 0, 0, 3, 14, 0, 4, 9, 0, 0, 0, 1, 6, 0, 4, 16, 0, 0, 0];
    const CODES: [u8; 28] =
        [0, 4, 1, 0, 0, 0, 1, 4, 0, 0, 0, 0, 4, 8, 0, 4, 1, 0, 0, 0, 1, 0, 6, 4, 0, 0, 0, 0];
    let (name, flags, types, user_data, elements): (_, u32, _, &[u8], AnonymousElements<'_>) =
        match expression {
            Expression::ProtocolWithPorts { .. } => {
                let elements = [6u8, 17, 132].map(|protocol| (vec![protocol], None)).to_vec();
                ("__set%d", 3, (12, 1), &PROTOCOLS, elements)
            }
            Expression::Dispatch { verdicts, .. } => {
                let elements =
                    verdicts.iter().map(|(code, verdict)| (code.to_ne_bytes().to_vec(), Some(verdict)));
                ("__map%d", 0xb, (23, 4), &CODES, elements.collect())
            }
            _ => return None,
        };
    let id = batch.set_id();
    batch.push(NEW_SET, CREATE, family, |writer| {
        writer.string(1, table);
        writer.string(2, name);
        writer.number(3, flags);
        writer.number(4, types.0);
        writer.number(5, types.1);
        if flags & 8 != 0 {
            writer.number(6, 0xffff_ff00);
            writer.number(7, 16);
        }
        writer.nest(9, |writer| writer.number(1, elements.len() as u32));
        writer.number(10, id);
        writer.attribute(13, user_data);
    });
    batch.push(NEW_ELEMENT, CREATE, family, |writer| {
        writer.string(1, table);
        writer.string(2, name);
        writer.nest(3, |writer| {
            for (key, verdict) in &elements {
                writer.nest(1, |writer| {
                    writer.nest(1, |writer| writer.attribute(1, key));
                    if let Some(verdict) = verdict {
                        writer.nest(2, |writer| verdict.encode(writer));
                    }
                });
            }
        });
        writer.number(4, id);
    });
    Some(Anonymous { id, name })
}

impl Expression {
    fn encode(&self, writer: &mut Writer, set: Option<&Anonymous>) {
        let expression = |writer: &mut Writer, name: &str, body: &dyn Fn(&mut Writer)| {
            writer.nest(1, |writer| {
                writer.string(1, name);
                writer.nest(2, |writer| body(writer));
            });
        };
        let numbers = |writer: &mut Writer, name: &str, values: &[(u16, u32)]| {
            expression(writer, name, &|writer| {
                values.iter().for_each(|(kind, value)| writer.number(*kind, *value));
            });
        };
        match self {
            Expression::LoadMeta { key, register: to } => {
                numbers(writer, "meta", &[(2, *key), (1, register(*to))]);
            }
            Expression::SetMeta { key, register: from } => {
                numbers(writer, "meta", &[(2, *key), (3, register(*from))]);
            }
            Expression::LoadPayload { base, offset, length, register: to } => {
                numbers(writer, "payload", &[(1, register(*to)), (2, *base), (3, *offset), (4, *length)]);
            }
            Expression::LoadConntrack { key, register: to } => {
                numbers(writer, "ct", &[(1, register(*to)), (2, *key)]);
            }
            Expression::LoadSourceType { register: to } => {
                numbers(writer, "fib", &[(3, 1), (2, 3), (1, register(*to))]);
            }
            Expression::Bitwise { register: both, mask, xor } => expression(writer, "bitwise", &|writer| {
                writer.number(1, register(*both));
                writer.number(2, register(*both));
                writer.number(3, 4);
                writer.nest(4, |writer| writer.attribute(1, &mask.to_ne_bytes()));
                writer.nest(5, |writer| writer.attribute(1, &xor.to_ne_bytes()));
            }),
            Expression::Compare { equal, register: from, data } => expression(writer, "cmp", &|writer| {
                writer.number(1, register(*from));
                writer.number(2, u32::from(!equal));
                writer.nest(3, |writer| writer.attribute(1, data));
            }),
            Expression::Immediate { register: to, value } => expression(writer, "immediate", &|writer| {
                writer.number(1, register(*to));
                writer.nest(2, |writer| writer.attribute(1, &value.to_ne_bytes()));
            }),
            Expression::Random { register: to, modulus } => {
                numbers(writer, "numgen", &[(1, register(*to)), (2, *modulus), (3, 1), (4, 0)]);
            }
            Expression::Hash { register: both, length, modulus, seed } => {
                let both = register(*both);
                numbers(
                    writer,
                    "hash",
                    &[(1, both), (2, both), (3, *length), (4, *modulus), (5, *seed), (7, 0)],
                );
            }
            Expression::Lookup { .. }
            | Expression::ProtocolWithPorts { .. }
            | Expression::Dispatch { .. } => {
                expression(writer, "lookup", &|writer| self.encode_lookup(writer, set));
            }
            Expression::Dynamic { operation, set, key, data, seconds } => {
                expression(writer, "dynset", &|writer| {
                    writer.number(4, register(*key));
                    writer.number(5, register(*data));
                    writer.number(3, if *operation == DynamicOperation::Update { 1 } else { 2 });
                    if *seconds > 0 {
                        writer.attribute(6, &(u64::from(*seconds) * 1000).to_be_bytes());
                    }
                    writer.string(1, set);
                });
            }
            Expression::DestinationNat { family, address, port } => {
                let values = [(1, 1), (2, u32::from(*family)), (3, register(*address)), (5, register(*port))];
                numbers(writer, "nat", &values);
            }
            Expression::Masquerade => numbers(writer, "masq", &[(1, 0x10)]),
            Expression::Reject { code } => expression(writer, "reject", &|writer| {
                writer.number(1, 0);
                writer.attribute(2, &[*code]);
            }),
            Expression::Verdict(verdict) => expression(writer, "immediate", &|writer| {
                writer.number(1, 0);
                writer.nest(2, |writer| verdict.encode(writer));
            }),
        }
    }

    fn encode_lookup(&self, writer: &mut Writer, anonymous: Option<&Anonymous>) {
        match self {
            Expression::Lookup { set, register: from, result } => {
                writer.string(1, set);
                writer.number(2, register(*from));
                if let Some(to) = result {
                    writer.number(3, to.map_or(0, register));
                }
            }
            Expression::ProtocolWithPorts { register: from }
            | Expression::Dispatch { register: from, .. } => {
                writer.string(1, anonymous.map_or("", |set| set.name));
                writer.number(2, register(*from));
                if matches!(self, Expression::Dispatch { .. }) {
                    writer.number(3, 0);
                }
                writer.number(4, anonymous.map_or(0, |set| set.id));
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

impl Rule {
    /// Hash of the rule's content, kept beside the rule in the kernel: rules cannot be changed, only replaced,
    /// so a chain whose rules carry the right fingerprints in the right order is the chain that we wrote.
    pub(crate) fn fingerprint(&self, family: u8) -> u64 {
        let mut writer = Writer::default();
        for expression in &self.0 {
            expression.encode(&mut writer, None);
            if let Expression::Dispatch { verdicts, .. } = expression {
                for (code, verdict) in verdicts {
                    writer.number(1, *code);
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
        let mut user_data = vec![FINGERPRINT, 8];
        user_data.extend(self.fingerprint(family).to_le_bytes());
        batch.push(super::netlink::NEW_RULE, CREATE | super::netlink::APPEND, family, |writer| {
            writer.string(1, table);
            writer.string(2, chain);
            writer.nest(4, |writer| {
                for (expression, set) in self.0.iter().zip(&sets) {
                    expression.encode(writer, set.as_ref());
                }
            });
            writer.attribute(7, &user_data);
        });
    }
}

/// The fingerprint in a rule's user data; `None` if the rule is not ours.
pub(crate) fn fingerprint_of(user_data: &[u8]) -> Option<u64> {
    let value = user_data.strip_prefix(&[FINGERPRINT, 8])?;
    Some(u64::from_le_bytes(value.try_into().ok()?))
}
