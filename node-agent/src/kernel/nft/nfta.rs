//! Attribute types of nf_tables messages, by object: the `NFTA_*` enumerations of `linux/netfilter/nf_tables.h`, which
//! `libc` lacks, and the few values of that header that it lacks too.

macro_rules! attributes {
    ($($(#[$note:meta])* $object:ident { $($name:ident = $number:literal),* $(,)? })*) => {
        $($(#[$note])* pub(crate) mod $object {
            $(pub(crate) const $name: u16 = $number;)*
        })*
    };
}

attributes! {
    /// `NFTA_TABLE_*`.
    table { NAME = 1, FLAGS = 2 }
    /// `NFTA_CHAIN_*`.
    chain { TABLE = 1, NAME = 3, HOOK = 4, POLICY = 5, TYPE = 7 }
    /// `NFTA_HOOK_*`.
    hook { NUMBER = 1, PRIORITY = 2 }
    /// `NFTA_RULE_*`.
    rule { TABLE = 1, CHAIN = 2, EXPRESSIONS = 4, USER_DATA = 7 }
    /// `NFTA_SET_*`.
    set {
        TABLE = 1, NAME = 2, FLAGS = 3, KEY_TYPE = 4, KEY_LENGTH = 5, DATA_TYPE = 6, DATA_LENGTH = 7,
        DESCRIPTION = 9, ID = 10, USER_DATA = 13,
    }
    /// `NFTA_SET_DESC_*`.
    set_description { SIZE = 1 }
    /// `NFTA_SET_ELEM_LIST_*`.
    element_list { TABLE = 1, SET = 2, ELEMENTS = 3, SET_ID = 4 }
    /// `NFTA_LIST_*`: entries of a list of expressions or elements.
    list { ENTRY = 1 }
    /// `NFTA_SET_ELEM_*`.
    element { KEY = 1, DATA = 2, FLAGS = 3 }
    /// `NFTA_DATA_*`.
    data { VALUE = 1, VERDICT = 2 }
    /// `NFTA_VERDICT_*`.
    verdict { CODE = 1, CHAIN = 2 }
    /// `NFTA_GEN_*`.
    generation { ID = 1 }
    /// `NFTA_EXPR_*`.
    expression { NAME = 1, DATA = 2 }
    /// `NFTA_META_*`.
    meta { DESTINATION = 1, KEY = 2, SOURCE = 3 }
    /// `NFTA_PAYLOAD_*`.
    payload { DESTINATION = 1, BASE = 2, OFFSET = 3, LENGTH = 4 }
    /// `NFTA_CT_*`.
    ct { DESTINATION = 1, KEY = 2 }
    /// `NFTA_FIB_*`.
    fib { DESTINATION = 1, RESULT = 2, FLAGS = 3 }
    /// `NFTA_BITWISE_*`.
    bitwise { SOURCE = 1, DESTINATION = 2, LENGTH = 3, MASK = 4, XOR = 5 }
    /// `NFTA_CMP_*`.
    compare { SOURCE = 1, OPERATION = 2, DATA = 3 }
    /// `NFTA_IMMEDIATE_*`.
    immediate { DESTINATION = 1, DATA = 2 }
    /// `NFTA_NG_*`.
    numgen { DESTINATION = 1, MODULUS = 2, TYPE = 3, OFFSET = 4 }
    /// `NFTA_HASH_*`.
    hash { SOURCE = 1, DESTINATION = 2, LENGTH = 3, MODULUS = 4, SEED = 5, TYPE = 7 }
    /// `NFTA_LOOKUP_*`.
    lookup { SET = 1, SOURCE = 2, DESTINATION = 3, SET_ID = 4 }
    /// `NFTA_DYNSET_*`.
    dynset { SET = 1, OPERATION = 3, KEY = 4, DATA = 5, TIMEOUT = 6 }
    /// `NFTA_NAT_*`.
    nat { TYPE = 1, FAMILY = 2, ADDRESS = 3, PORT = 5 }
    /// `NFTA_MASQ_*`.
    masquerade { FLAGS = 1 }
    /// `NFTA_REJECT_*`.
    reject { TYPE = 1, CODE = 2 }
}

/// `NFTA_FIB_F_SADDR`.
pub(crate) const FIB_SOURCE_ADDRESS: u32 = 1;
/// `NFT_FIB_RESULT_ADDRTYPE`.
pub(crate) const FIB_ADDRESS_TYPE: u32 = 3;
/// `NFT_HASH_JENKINS`.
pub(crate) const HASH_JENKINS: u32 = 0;
/// `NFT_DYNSET_OP_DELETE`.
pub(crate) const DYNSET_DELETE: u32 = 2;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
pub(crate) const RANDOM_FULLY: u32 = 0x10;
