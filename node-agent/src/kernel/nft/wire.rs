//! Netlink messages as bytes: writing attributes into a buffer and walking over received ones.
//!
//! Attribute lengths are 16 bit (a nest holds less than 64 KiB), everything is aligned to 4 bytes, headers are
//! in host order and nf_tables' integers in network order. Reading never panics: what is too short is skipped.

/// Set on the type of an attribute that contains attributes.
const NESTED: u16 = 0x8000;
/// Length of `nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Length of `nlmsghdr` and `nfgenmsg`.
pub(crate) const FULL_HEADER: usize = 20;

/// Builds consecutive netlink messages in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pub(crate) bytes: Vec<u8>,
}

impl Writer {
    /// Appends a message: `nlmsghdr`, `nfgenmsg`, and what `body` writes.
    pub(crate) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        (family, resource): (u8, u16),
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        body(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Appends an attribute with a plain value.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
    }

    /// Appends an integer attribute in network order.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Appends a string attribute, with the terminating zero that the kernel expects.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        self.bytes.extend((value.len() as u16 + 5).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    /// Appends an attribute that contains what `body` writes.
    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        body(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        let aligned = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(aligned, 0);
    }
}

/// Walks over attributes: (type without flags, value).
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// The value of the first attribute of this type.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// The value of an attribute inside nests, by the path of types.
pub(crate) fn find_path<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |inner, kind| find(inner, *kind))
}

/// A 32-bit integer attribute in network order.
pub(crate) fn find_number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(find(bytes, kind)?.try_into().ok()?))
}

/// A string attribute without its terminating zero; `None` if it is not UTF-8.
pub(crate) fn find_string(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()
}

/// One received message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) port: u32,
    /// What follows `nlmsghdr`.
    pub(crate) payload: &'a [u8],
}

impl<'a> Received<'a> {
    /// The attributes after `nfgenmsg`.
    pub(crate) fn attributes(&self) -> &'a [u8] {
        self.payload.get(4..).unwrap_or_default()
    }
}

/// Cuts a datagram into messages.
#[derive(Debug)]
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Received<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let word =
            |at: usize| -> Option<u32> { Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?)) };
        let (length, kind_flags) = (word(0)? as usize, word(4)?.to_ne_bytes());
        let (sequence, port) = (word(8)?, word(12)?);
        let payload = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16::from_ne_bytes([kind_flags[0], kind_flags[1]]),
            flags: u16::from_ne_bytes([kind_flags[2], kind_flags[3]]),
            sequence,
            port,
            payload,
        })
    }
}
