//! User data of sets and rules: type, length and value of each entry in one byte, one byte and up to 255 bytes.
//!
//! The kernel stores user data without reading it. nft 1.0.6 reads that of sets to print them as they were declared:
//! numbers here are those of its `enum nftnl_udata_set_types`, `enum byteorder` and `enum expr_types`.

/// A list of entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct UserData(pub(crate) Vec<u8>);

/// Byte order of a set's keys or values; a concatenation has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ByteOrder {
    Unspecified = 0,
    Host = 1,
    Network = 2,
}

/// Types of the entries of a set.
mod entry {
    pub(super) const KEY_BYTE_ORDER: u8 = 0;
    pub(super) const DATA_BYTE_ORDER: u8 = 1;
    pub(super) const KEY_TYPEOF: u8 = 3;
    pub(super) const DATA_TYPEOF: u8 = 4;
    pub(super) const DATA_INTERVAL: u8 = 6;
}

/// Entries of a `typeof`: the kind of the expression and its details.
mod type_of {
    pub(super) const EXPRESSION: u8 = 0;
    pub(super) const DETAILS: u8 = 1;
}

/// Kinds of expressions in a `typeof`.
mod expression {
    pub(super) const VERDICT: u32 = 1;
    pub(super) const META: u32 = 9;
    pub(super) const CONCATENATION: u32 = 13;
    pub(super) const NUMGEN: u32 = 23;
}

/// Details of the `typeof` of `meta` and `numgen`.
mod detail {
    pub(super) const META_KEY: u8 = 0;
    pub(super) const NUMGEN_TYPE: u8 = 0;
    pub(super) const NUMGEN_MODULUS: u8 = 1;
    pub(super) const NUMGEN_OFFSET: u8 = 2;
}

impl UserData {
    /// Appends an entry.
    pub(crate) fn bytes(mut self, kind: u8, value: &[u8]) -> Self {
        self.0.extend([kind, value.len() as u8]);
        self.0.extend(value);
        self
    }

    fn number(self, kind: u8, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    fn nest(self, kind: u8, inner: &UserData) -> Self {
        self.bytes(kind, &inner.0)
    }

    /// Starts the user data of a set.
    pub(crate) fn set(key: ByteOrder) -> Self {
        UserData::default().number(entry::KEY_BYTE_ORDER, key as u32)
    }

    /// Starts the user data of a map.
    pub(crate) fn map(key: ByteOrder, data: ByteOrder) -> Self {
        Self::set(key).number(entry::DATA_BYTE_ORDER, data as u32)
    }

    /// Ends the user data of a map whose values are no intervals.
    pub(crate) fn single_values(self) -> Self {
        self.number(entry::DATA_INTERVAL, 0)
    }

    pub(crate) fn key_typeof(self, expression: &UserData) -> Self {
        self.nest(entry::KEY_TYPEOF, expression)
    }

    pub(crate) fn data_typeof(self, expression: &UserData) -> Self {
        self.nest(entry::DATA_TYPEOF, expression)
    }

    fn type_of(expression: u32, details: &UserData) -> Self {
        UserData::default().number(type_of::EXPRESSION, expression).nest(type_of::DETAILS, details)
    }

    /// A concatenation of these expressions; without any, one whose fields follow from the data type.
    pub(crate) fn concatenation(fields: &[UserData]) -> Self {
        let fields = fields
            .iter()
            .enumerate()
            .fold(UserData::default(), |details, (index, field)| details.nest(index as u8, field));
        Self::type_of(expression::CONCATENATION, &fields)
    }

    /// The result of a verdict map.
    pub(crate) fn verdict() -> Self {
        Self::type_of(expression::VERDICT, &UserData::default())
    }

    /// `meta KEY`, with a key of `NFT_META_*`.
    pub(crate) fn meta(key: i32) -> Self {
        Self::type_of(expression::META, &UserData::default().number(detail::META_KEY, key as u32))
    }

    /// `numgen random mod MODULUS`.
    pub(crate) fn random(modulus: u32) -> Self {
        let details = UserData::default()
            .number(detail::NUMGEN_TYPE, libc::NFT_NG_RANDOM as u32)
            .number(detail::NUMGEN_MODULUS, modulus)
            .number(detail::NUMGEN_OFFSET, 0);
        Self::type_of(expression::NUMGEN, &details)
    }
}
