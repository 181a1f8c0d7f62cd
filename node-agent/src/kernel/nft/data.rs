//! Content of `NFTA_*_DATA` attributes: a value or a verdict.

use super::nfta;
use crate::kernel::netlink::wire::Writer;

/// The verdict of a rule.
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
            Verdict::Drop => libc::NF_DROP,
            Verdict::Accept => libc::NF_ACCEPT,
            Verdict::Jump(_) => libc::NFT_JUMP,
            Verdict::Goto(_) => libc::NFT_GOTO,
            Verdict::Return => libc::NFT_RETURN,
        }
    }

    /// Writes the content of an `NFTA_*_DATA` attribute.
    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.nest(nfta::data::VERDICT, |writer| {
            writer.number(nfta::verdict::CODE, self.code() as u32);
            if let Verdict::Jump(chain) | Verdict::Goto(chain) = self {
                writer.string(nfta::verdict::CHAIN, chain);
            }
        });
    }
}

/// Writes a nest that holds a plain value.
pub(crate) fn write_value(writer: &mut Writer, kind: u16, bytes: &[u8]) {
    writer.nest(kind, |writer| writer.attribute(nfta::data::VALUE, bytes));
}
