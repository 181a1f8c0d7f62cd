//! One layer with the log of its latest changes, already encoded.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use prost::Message as _;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::{Buckets, Change, ChangeInfo, LayerKind, Part, PartKind, Segment};

use super::items::Items;
use super::{LogLimits, PART, RawSnapshot, Snapshot, moves};
use crate::drain::Moves;
use crate::model::LayerId;

/// Size in bytes below which a snapshot is encoded on request; above, it is compressed once and kept.
const SMALL: usize = 32 << 10;
/// A log may always hold this much, however small its layer is.
const LOG_MINIMUM: usize = 64 << 10;
/// Cost of an entry in addition to its payload, in bytes: itself, its vectors and its share of the descriptions.
const ENTRY: usize = 512;
/// Joined segments that are kept for other nodes at the same place.
const JOINED: usize = 8;

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) revision: u64,
    segments: Vec<Bytes>,
    bytes: usize,
    pub(super) infos: Arc<[ChangeInfo]>,
    after: Digest,
}

/// A revision that changes layers.
pub(super) struct Publication<'a> {
    pub(super) revision: u64,
    /// Its causes.
    pub(super) infos: &'a Arc<[ChangeInfo]>,
    /// Bounds of the log.
    pub(super) limits: &'a LogLimits,
}

#[derive(Debug)]
struct Joined {
    from: u64,
    to: u64,
    segments: Vec<Bytes>,
}

#[derive(Debug)]
pub(super) struct Layer {
    kind: LayerKind,
    /// Shared with a snapshot while it is encoded.
    pub(super) items: Arc<Items>,
    /// The log covers everything after this revision.
    floor: u64,
    floor_digest: Digest,
    log: VecDeque<Entry>,
    log_bytes: usize,
    joined: Mutex<VecDeque<Joined>>,
    snapshot: Mutex<Option<Arc<Snapshot>>>,
}

impl Layer {
    pub(super) fn new(kind: LayerKind, floor: u64) -> Self {
        Self {
            kind,
            items: Arc::new(Items::new(kind)),
            floor,
            floor_digest: Digest::default(),
            log: VecDeque::new(),
            log_bytes: 0,
            joined: Mutex::default(),
            snapshot: Mutex::default(),
        }
    }

    /// Applies changes; returns how many were dropped as malformed, and whether anything is different now.
    pub(super) fn apply(
        &mut self,
        changes: Vec<Change>,
        publication: &Publication<'_>,
        mut moves: Option<&mut Moves>,
    ) -> (usize, bool) {
        let mut effective = Vec::new();
        let mut dropped = 0;
        let items = Arc::make_mut(&mut self.items);
        for change in changes {
            let applied = effective.len();
            if let Some(moves) = moves.as_deref_mut() {
                moves::before(items, &change, moves);
            }
            dropped += usize::from(!items.apply(change, &mut effective));
            if let Some(moves) = moves.as_deref_mut() {
                effective[applied..].iter().for_each(|change| moves::after(change, moves));
            }
        }
        let Publication { revision, infos, limits } = *publication;
        if effective.is_empty() {
            return (dropped, false);
        }
        let segments = encode_segments(effective);
        let bytes = segments.iter().map(Bytes::len).sum::<usize>() + ENTRY;
        self.log_bytes += bytes;
        let after = self.items.digest();
        self.log.push_back(Entry { revision, segments, bytes, infos: infos.clone(), after });
        let allowed = (self.items.size() / 4).clamp(LOG_MINIMUM, limits.bytes.max(LOG_MINIMUM));
        while self.log_bytes > allowed || self.log.len() > limits.entries {
            self.forget_oldest();
        }
        (dropped, true)
    }

    fn forget_oldest(&mut self) {
        let Some(old) = self.log.pop_front() else { return };
        self.log_bytes -= old.bytes;
        self.floor = old.revision;
        self.floor_digest = old.after;
    }

    /// Drops the entries up to and including `revision`.
    pub(super) fn forget(&mut self, revision: u64) {
        while self.log.front().is_some_and(|entry| entry.revision <= revision) {
            self.forget_oldest();
        }
    }

    /// The revision that the log begins after.
    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    /// Entries of the log.
    pub(super) fn entries(&self) -> usize {
        self.log.len()
    }

    /// Returns true if the log covers everything after `revision`.
    pub(super) fn covers(&self, revision: u64) -> bool {
        revision >= self.floor
    }

    /// Changes after `revision`, oldest first.
    pub(super) fn since(&self, revision: u64) -> impl ExactSizeIterator<Item = &Entry> {
        let start = self.log.partition_point(|entry| entry.revision <= revision);
        self.log.range(start..)
    }

    /// The digest that the layer had at `revision`; `None` if that is forgotten.
    pub(super) fn digest_at(&self, revision: u64) -> Option<Digest> {
        match self.log.partition_point(|entry| entry.revision <= revision) {
            0 => self.covers(revision).then_some(self.floor_digest),
            after => Some(self.log[after - 1].after),
        }
    }

    /// The changes in (`from`, head] as parts. Equal requests share the bytes.
    pub(super) fn delta(&self, from: u64, parts: &mut Vec<Part>) {
        let mut entries = self.since(from);
        let segments = match (entries.len(), entries.next()) {
            (0, _) | (_, None) => return,
            (1, Some(entry)) => entry.segments.clone(),
            (_, Some(_)) => self.joined(from),
        };
        let part = |payload| Part { layer: self.kind as i32, kind: PartKind::Delta as i32, payload };
        parts.extend(segments.into_iter().map(part));
    }

    fn joined(&self, from: u64) -> Vec<Bytes> {
        let to = self.log.back().map_or(0, |entry| entry.revision);
        let mut known = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(joined) = known.iter().find(|joined| joined.from == from && joined.to == to) {
            return joined.segments.clone();
        }
        let (mut segments, mut buffer) = (Vec::new(), Vec::new());
        for segment in self.since(from).flat_map(|entry| &entry.segments) {
            if buffer.len() + segment.len() > PART {
                segments.push(Bytes::from(std::mem::take(&mut buffer)));
            }
            // A message that is only a repeated field: encodings one after the other are the joined list.
            buffer.extend_from_slice(segment);
        }
        segments.push(Bytes::from(buffer));
        known.retain(|joined| joined.to == to);
        if known.len() == JOINED {
            known.pop_front();
        }
        known.push_back(Joined { from, to, segments: segments.clone() });
        segments
    }

    /// The whole layer as parts, or what has to be compressed first.
    pub(super) fn snapshot(
        &self,
        id: &LayerId,
        head: u64,
        parts: &mut Vec<Part>,
    ) -> Result<(), Box<RawSnapshot>> {
        if self.items.size() > SMALL {
            let known = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(snapshot) = known.filter(|snapshot| self.covers(snapshot.revision)) {
                parts.extend(snapshot.parts.iter().cloned());
                self.delta(snapshot.revision, parts);
                return Ok(());
            }
            let items = self.items.clone();
            return Err(Box::new(RawSnapshot { layer: id.clone(), kind: self.kind, revision: head, items }));
        }
        let part = |payload: Vec<u8>| Part {
            layer: self.kind as i32,
            kind: PartKind::Snapshot as i32,
            payload: payload.into(),
        };
        parts.extend(encode(&self.items).into_iter().map(part));
        Ok(())
    }

    pub(super) fn keep(&self, snapshot: Snapshot) {
        let mut known = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.revision < snapshot.revision) {
            *known = Some(Arc::new(snapshot));
        }
    }
}

fn encode_segments(changes: Vec<Change>) -> Vec<Bytes> {
    let (mut segments, mut segment, mut size) = (Vec::new(), Vec::new(), 0);
    for change in changes {
        let length = change.encoded_len() + 8;
        if size + length > PART && !segment.is_empty() {
            segments.push(Segment { changes: std::mem::take(&mut segment) }.encode_to_vec().into());
            size = 0;
        }
        size += length;
        segment.push(change);
    }
    segments.push(Segment { changes: segment }.encode_to_vec().into());
    segments
}

/// Returns at least one payload, even for an empty layer: it announces the replacement.
pub(super) fn encode(items: &Items) -> Vec<Vec<u8>> {
    let (mut payloads, mut buckets, mut size) = (Vec::new(), Vec::new(), 0);
    for bucket in items.buckets() {
        // Key and length of the bucket within the list.
        let length = bucket.encoded_len() + 8;
        if size + length > PART && !buckets.is_empty() {
            payloads.push(Buckets { buckets: std::mem::take(&mut buckets) }.encode_to_vec());
            size = 0;
        }
        size += length;
        buckets.push(bucket);
    }
    payloads.push(Buckets { buckets }.encode_to_vec());
    payloads
}
