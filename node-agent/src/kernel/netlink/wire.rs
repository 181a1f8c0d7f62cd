//! Netlink messages as bytes: writes attributes into a buffer and walks over received ones.
//!
//! Invariants:
//! * Attribute lengths have 16 bits (a nest holds less than 64 KiB), everything is aligned to 4 bytes, headers are in
//!   host order.
//! * Reading never panics: a truncated message or attribute is skipped.

/// Length of `nlmsghdr` in bytes.
pub(in crate::kernel) const MESSAGE_HEADER: usize = size_of::<libc::nlmsghdr>();

/// The fields of `nlmsghdr` that a request sets.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernel) struct Header {
    pub(in crate::kernel) kind: u16,
    pub(in crate::kernel) flags: u16,
    pub(in crate::kernel) sequence: u32,
}

/// Returns an `nfgenmsg`, which follows the header of every netfilter message.
pub(in crate::kernel) fn netfilter_header(family: u8, resource: u16) -> [u8; 4] {
    let resource = resource.to_be_bytes();
    [family, libc::NFNETLINK_V0 as u8, resource[0], resource[1]]
}

/// Returns the type of a netfilter message: the subsystem (`NFNL_SUBSYS_*`) in the high byte, the message
/// (`NFT_MSG_*`, `IPCTNL_MSG_*`) in the low one.
pub(in crate::kernel) const fn netfilter_type(subsystem: i32, message: i32) -> u16 {
    (subsystem << 8 | message) as u16
}

/// Builds consecutive netlink messages in one buffer.
#[derive(Debug, Default)]
pub(in crate::kernel) struct Writer {
    pub(in crate::kernel) bytes: Vec<u8>,
}

impl Writer {
    /// Appends a message: `nlmsghdr` and the output of `body`.
    pub(in crate::kernel) fn message(&mut self, header: Header, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(header.kind.to_ne_bytes());
        self.bytes.extend(header.flags.to_ne_bytes());
        self.bytes.extend(header.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        body(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Appends bytes that are not an attribute: the second header of a message.
    pub(in crate::kernel) fn header(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Appends an attribute with a plain value.
    pub(in crate::kernel) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend((value.len() as u16 + 4).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.pad();
    }

    /// Appends an integer attribute in network order.
    pub(in crate::kernel) fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Appends a string attribute with the terminating zero that the kernel expects.
    pub(in crate::kernel) fn string(&mut self, kind: u16, value: &str) {
        self.bytes.extend((value.len() as u16 + 5).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    /// Appends an attribute that contains the output of `body`.
    pub(in crate::kernel) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend((kind | libc::NLA_F_NESTED as u16).to_ne_bytes());
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
pub(in crate::kernel) struct Attributes<'a>(pub(in crate::kernel) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & libc::NLA_TYPE_MASK as u16;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// Returns the value of the first attribute of this type.
pub(in crate::kernel) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Returns the value of an attribute inside nests, by the path of types.
pub(in crate::kernel) fn find_path<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |inner, kind| find(inner, *kind))
}

/// Returns a 32-bit integer attribute in network order.
pub(in crate::kernel) fn find_number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(find(bytes, kind)?.try_into().ok()?))
}

/// Returns a string attribute without its terminating zero; `None` if it is not UTF-8.
pub(in crate::kernel) fn find_string(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()
}

/// One received message.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernel) struct Message<'a> {
    pub(in crate::kernel) kind: u16,
    pub(in crate::kernel) flags: u16,
    pub(in crate::kernel) sequence: u32,
    /// Port id of the socket whose request caused the message.
    pub(in crate::kernel) port: u32,
    /// The bytes after `nlmsghdr`.
    pub(in crate::kernel) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Returns the attributes of a netfilter message.
    pub(in crate::kernel) fn attributes(&self) -> &'a [u8] {
        self.payload.get(size_of_val(&netfilter_header(0, 0))..).unwrap_or_default()
    }
}

/// Splits a datagram into messages.
#[derive(Debug)]
pub(in crate::kernel) struct Messages<'a>(pub(in crate::kernel) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let word =
            |at: usize| -> Option<u32> { Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?)) };
        let (length, kind_flags) = (word(0)? as usize, word(4)?.to_ne_bytes());
        let (sequence, port) = (word(8)?, word(12)?);
        let payload = self.0.get(MESSAGE_HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([kind_flags[0], kind_flags[1]]),
            flags: u16::from_ne_bytes([kind_flags[2], kind_flags[3]]),
            sequence,
            port,
            payload,
        })
    }
}
