//! A W3C trace context, as it travels in `traceparent`.

use std::fmt;
use std::str::FromStr;

/// A span of a trace. Neither identifier is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// The trace.
    pub trace: u128,
    /// The span in it.
    pub span: u64,
    /// The origin of the trace samples it. Traces that turn out slow or failed are kept anyway.
    pub sampled: bool,
}

/// A text that is no `traceparent` of version 00 (or a later one that begins alike).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent: expected 00-<32 hex digits>-<16 hex digits>-<2 hex digits>")]
pub struct InvalidTraceparent;

impl fmt::Display for TraceContext {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

impl FromStr for TraceContext {
    type Err = InvalidTraceparent;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut fields = text.split('-');
        let mut field = |length: usize| {
            let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            fields
                .next()
                .filter(|field| field.len() == length && field.bytes().all(hex))
                .ok_or(InvalidTraceparent)
        };
        let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        // Later versions may append fields; ff is forbidden.
        if version == "ff" || (version == "00" && fields.next().is_some()) {
            return Err(InvalidTraceparent);
        }
        let trace = u128::from_str_radix(trace, 16).map_err(|_| InvalidTraceparent)?;
        let span = u64::from_str_radix(span, 16).map_err(|_| InvalidTraceparent)?;
        let flags = u8::from_str_radix(flags, 16).map_err(|_| InvalidTraceparent)?;
        if trace == 0 || span == 0 {
            return Err(InvalidTraceparent);
        }
        Ok(Self { trace, span, sampled: flags & 1 == 1 })
    }
}
