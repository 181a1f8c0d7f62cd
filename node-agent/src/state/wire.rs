//! Streaming decoder for the changes of a payload.
//!
//! A decoded change is some hundred times larger than the two bytes that an empty one takes on the wire, so
//! a payload is never decoded as a whole: memory follows the largest single change.

use prost::Message as _;
use prost::encoding::decode_varint;
use switchtower_proto::digest::BUCKETS;
use switchtower_proto::v1::Change;

use super::pack::Malformed;

/// Maximum encoded size of one change in bytes. Larger pools arrive as several patches.
pub(crate) const CHANGE_LIMIT: usize = 4 << 20;

/// One field of a message: its number and, if it is length-delimited, its content.
struct Field<'a> {
    number: u64,
    content: Option<&'a [u8]>,
    varint: u64,
}

fn next_field<'a>(rest: &mut &'a [u8]) -> Result<Option<Field<'a>>, Malformed> {
    if rest.is_empty() {
        return Ok(None);
    }
    let broken = |_| Malformed("a payload ends inside a field".into());
    let tag = decode_varint(rest).map_err(broken)?;
    let mut field = Field { number: tag >> 3, content: None, varint: 0 };
    match tag & 7 {
        0 => field.varint = decode_varint(rest).map_err(broken)?,
        2 => {
            let length = decode_varint(rest).map_err(broken)?;
            let length = usize::try_from(length).ok().filter(|length| *length <= rest.len());
            let Some(length) = length else {
                return Err(Malformed("a payload's field is longer than the payload".into()));
            };
            let (content, after) = rest.split_at(length);
            field.content = Some(content);
            *rest = after;
        }
        other => return Err(Malformed(format!("a payload's field has wire type {other}"))),
    }
    Ok(Some(field))
}

fn change(
    content: Option<&[u8]>,
    each: &mut dyn FnMut(Change) -> Result<(), super::RefusedUpdate>,
) -> Result<(), super::RefusedUpdate> {
    let Some(content) = content else {
        return Err(Malformed("a change is not a message".into()).into());
    };
    if content.len() > CHANGE_LIMIT {
        let detail = format!("one change has {} bytes, the limit is {CHANGE_LIMIT}", content.len());
        return Err(super::RefusedUpdate::over_limit(detail));
    }
    let change =
        Change::decode(content).map_err(|error| Malformed(format!("a change cannot be decoded: {error}")))?;
    each(change)
}

/// Calls `each` for every change of an encoded `Segment`.
pub(super) fn segment(
    mut payload: &[u8],
    each: &mut dyn FnMut(Change) -> Result<(), super::RefusedUpdate>,
) -> Result<(), super::RefusedUpdate> {
    while let Some(field) = next_field(&mut payload)? {
        if field.number == 1 {
            change(field.content, each)?;
        }
    }
    Ok(())
}

/// Calls `each` for every change of encoded `Buckets`.
pub(super) fn buckets(
    mut payload: &[u8],
    each: &mut dyn FnMut(Change) -> Result<(), super::RefusedUpdate>,
) -> Result<(), super::RefusedUpdate> {
    while let Some(field) = next_field(&mut payload)? {
        if field.number != 1 {
            continue;
        }
        let Some(mut bucket) = field.content else {
            return Err(Malformed("a bucket is not a message".into()).into());
        };
        while let Some(field) = next_field(&mut bucket)? {
            match field.number {
                1 if field.varint >= u64::from(BUCKETS) => {
                    return Err(Malformed(format!("bucket {} does not exist", field.varint)).into());
                }
                3 => change(field.content, each)?,
                _ => {}
            }
        }
    }
    Ok(())
}
