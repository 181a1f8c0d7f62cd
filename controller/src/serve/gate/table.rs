//! Rules for unauthenticated connections, without clock and sockets.
//!
//! A connection passes three stages: silent until its ClientHello is complete, handshake until TLS is established,
//! anonymous until a stream on it is authenticated. Each stage is a pool with a total limit, a limit per source
//! address and a deadline, so that connections of one stage never displace those of a later one. Known sources
//! (nodes) and strangers have separate pools, so that strangers cannot displace nodes.
//!
//! In a full pool, a new connection displaces one of the source with the most connections. At the limit of its source
//! it displaces the oldest connection of that source, but not one younger than [`GRACE`]: agents that reconnect at
//! once from one address must not keep displacing each other's handshakes.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::token_bucket::{Rate, TokenBucket};

/// Age below which a connection is only displaced in favor of a source with fewer connections.
const GRACE: Duration = Duration::from_secs(1);
/// Time for a peer to read the response that refuses it.
const LINGER: Duration = Duration::from_millis(500);

pub(super) type Id = u64;

/// Stage of an unauthenticated connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Accepted; the ClientHello is not complete.
    Silent,
    /// The ClientHello is complete; TLS is not.
    Handshake,
    /// TLS is established, or not used on this port.
    Anonymous,
}

/// Class of a source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Address of a Node, one from which an agent authenticated recently, or this host's own.
    Known,
    /// Any other address: any pod, any host.
    Stranger,
}

/// Limits of one stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool {
    /// Maximum number of connections.
    pub(crate) total: usize,
    /// Maximum number of connections of one source address.
    pub(crate) per_source: usize,
    /// Maximum duration of the stage.
    pub(crate) deadline: Duration,
}

/// Limits of one class of sources.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) silent: Pool,
    pub(crate) handshake: Pool,
    pub(crate) anonymous: Pool,
    /// Rate of handshakes of all sources together.
    pub(crate) rate: Rate,
    /// Rate of handshakes of one source.
    pub(crate) source_rate: Rate,
}

/// Limits of a port.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GateLimits {
    pub(crate) known: Bounds,
    pub(crate) strangers: Bounds,
}

/// Reason why the gate closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// Too many connections in this stage, of its source or in total.
    TooMany,
    /// Displaced by a connection of a source with fewer connections, or by a newer one of the same source.
    Displaced,
    /// Too many handshakes per second, of its source or in total.
    TooOften,
    /// The deadline of this stage passed.
    TimedOut(Stage),
    /// Its credential was refused and the response sent.
    Refused,
}

impl Rejection {
    /// Returns the value of the metric label `reason`.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::TooMany => "too_many_connections",
            Self::Displaced => "displaced",
            Self::TooOften => "handshake_rate",
            Self::TimedOut(Stage::Silent) => "no_client_hello",
            Self::TimedOut(Stage::Handshake) => "handshake_timeout",
            Self::TimedOut(Stage::Anonymous) => "no_stream",
            Self::Refused => "credential_refused",
        }
    }
}

/// Connections of one stage and class, oldest first for each source.
#[derive(Debug, Default)]
struct Members {
    sources: HashMap<IpAddr, VecDeque<(Id, Instant)>>,
    total: usize,
}

impl Members {
    /// Returns the connection that a new one displaces, or `None` while there is room.
    fn make_room(&self, pool: &Pool, source: IpAddr, now: Instant) -> Result<Option<Id>, Rejection> {
        let own = self.sources.get(&source);
        let aged =
            |(id, since): &(Id, Instant)| (now.saturating_duration_since(*since) >= GRACE).then_some(*id);
        let own_oldest = || own.and_then(VecDeque::front).and_then(aged).map(Some).ok_or(Rejection::TooMany);
        let count = own.map_or(0, VecDeque::len);
        if count >= pool.per_source {
            return own_oldest();
        }
        if self.total < pool.total {
            return Ok(None);
        }
        let size = |members: &&VecDeque<(Id, Instant)>| {
            (members.len(), std::cmp::Reverse(members.front().map(|(id, _)| *id)))
        };
        let largest = self.sources.values().max_by_key(size);
        match largest.and_then(|members| Some((members.len(), members.front()?))) {
            Some((most, (id, _))) if most > count + 1 => Ok(Some(*id)),
            Some((_, oldest)) => own_oldest().or_else(|full| aged(oldest).map(Some).ok_or(full)),
            None => Err(Rejection::TooMany),
        }
    }

    fn add(&mut self, source: IpAddr, id: Id, now: Instant) {
        self.sources.entry(source).or_default().push_back((id, now));
        self.total += 1;
    }

    fn remove(&mut self, source: IpAddr, id: Id) {
        let Some(members) = self.sources.get_mut(&source) else { return };
        let before = members.len();
        members.retain(|(member, _)| *member != id);
        self.total -= before - members.len();
        if members.is_empty() {
            self.sources.remove(&source);
        }
    }
}

#[derive(Debug)]
struct Entry<C> {
    source: IpAddr,
    class: Class,
    /// `None`: a stream on it is authenticated.
    stage: Option<Stage>,
    /// Authenticated streams.
    streams: usize,
    expires: Option<Instant>,
    refused: bool,
    close: C,
}

/// Pools and rates of one class.
#[derive(Debug)]
struct Side {
    pools: [Members; 3],
    all: TokenBucket,
    each: HashMap<IpAddr, TokenBucket>,
}

/// All connections of a port. `C` is what closes one.
#[derive(Debug)]
pub(super) struct Table<C> {
    limits: GateLimits,
    next: Id,
    entries: HashMap<Id, Entry<C>>,
    sides: [Side; 2],
}

/// A connection to be closed.
pub(super) type Closing<C> = (C, IpAddr, Rejection);

impl<C> Table<C> {
    pub(super) fn new(limits: GateLimits, now: Instant) -> Self {
        let side = |bounds: &Bounds| Side {
            pools: Default::default(),
            all: TokenBucket::new(bounds.rate, now),
            each: HashMap::new(),
        };
        let sides = [side(&limits.known), side(&limits.strangers)];
        Self { limits, next: 0, entries: HashMap::new(), sides }
    }

    /// Adds a connection. Returns its ID and the connection that it displaces, if any.
    pub(super) fn enter(
        &mut self,
        source: IpAddr,
        class: Class,
        close: C,
        now: Instant,
    ) -> Result<(Id, Option<Closing<C>>), Rejection> {
        let id = self.next;
        self.next += 1;
        let displaced = self.join(id, source, class, Stage::Silent, now)?;
        let expires = Some(now + self.pool(class, Stage::Silent).deadline);
        let stage = Some(Stage::Silent);
        let entry = Entry { source, class, stage, streams: 0, expires, refused: false, close };
        self.entries.insert(id, entry);
        Ok((id, displaced))
    }

    /// Moves a connection to another stage. After an error it is not in the table any more.
    pub(super) fn advance(
        &mut self,
        id: Id,
        stage: Stage,
        now: Instant,
    ) -> Result<Option<Closing<C>>, Rejection> {
        // Displaced already; its task is about to notice.
        let Some(entry) = self.entries.get(&id) else { return Ok(None) };
        let (source, class) = (entry.source, entry.class);
        self.leave_pool(id);
        let begun = if stage == Stage::Handshake { self.begin_handshake(source, class, now) } else { Ok(()) };
        match begun.and_then(|()| self.join(id, source, class, stage, now)) {
            Ok(displaced) => {
                let deadline = self.pool(class, stage).deadline;
                if let Some(entry) = self.entries.get_mut(&id) {
                    entry.stage = Some(stage);
                    entry.expires = Some(now + deadline);
                }
                Ok(displaced)
            }
            Err(turned) => {
                self.entries.remove(&id);
                Err(turned)
            }
        }
    }

    /// Records an authenticated stream. Returns false if the connection was closed before.
    pub(super) fn authenticated(&mut self, id: Id) -> bool {
        self.leave_pool(id);
        match self.entries.get_mut(&id) {
            Some(entry) => {
                entry.stage = None;
                entry.expires = None;
                entry.streams += 1;
                true
            }
            None => false,
        }
    }

    /// Records the end of an authenticated stream. After the last one the connection is anonymous again; after an
    /// error it is not in the table any more.
    pub(super) fn ended(&mut self, id: Id, now: Instant) -> Result<Option<Closing<C>>, Rejection> {
        let Some(entry) = self.entries.get_mut(&id) else { return Ok(None) };
        entry.streams = entry.streams.saturating_sub(1);
        if entry.streams > 0 { Ok(None) } else { self.advance(id, Stage::Anonymous, now) }
    }

    /// Records a refused credential: the connection is closed soon and serves no further requests.
    pub(super) fn refuse(&mut self, id: Id, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.stage.is_some()) else { return };
        entry.refused = true;
        let soon = now + LINGER;
        entry.expires = Some(entry.expires.map_or(soon, |expires| expires.min(soon)));
    }

    pub(super) fn is_refused(&self, id: Id) -> bool {
        self.entries.get(&id).is_none_or(|entry| entry.refused)
    }

    /// Removes a connection.
    pub(super) fn leave(&mut self, id: Id) {
        self.leave_pool(id);
        self.entries.remove(&id);
    }

    /// Returns connections past their deadline. Drops the token buckets that are full.
    pub(super) fn sweep(&mut self, now: Instant) -> Vec<Closing<C>> {
        let late = |entry: &Entry<C>| entry.expires.is_some_and(|expires| expires <= now);
        let late: Vec<Id> = self.entries.iter().filter(|(_, entry)| late(entry)).map(|(id, _)| *id).collect();
        let closing = late.into_iter().filter_map(|id| {
            let entry = self.entries.get(&id)?;
            let turned = match entry.stage {
                Some(_) if entry.refused => Rejection::Refused,
                Some(stage) => Rejection::TimedOut(stage),
                None => return None,
            };
            self.close(id, turned)
        });
        let closing = closing.collect();
        for side in &mut self.sides {
            side.each.retain(|_, bucket| !bucket.is_full(now));
        }
        closing
    }

    /// Number of connections, including authenticated ones.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn close(&mut self, id: Id, turned: Rejection) -> Option<Closing<C>> {
        self.leave_pool(id);
        self.entries.remove(&id).map(|entry| (entry.close, entry.source, turned))
    }

    fn join(
        &mut self,
        id: Id,
        source: IpAddr,
        class: Class,
        stage: Stage,
        now: Instant,
    ) -> Result<Option<Closing<C>>, Rejection> {
        let pool = *self.pool(class, stage);
        let displaced = self.sides[class as usize].pools[stage as usize].make_room(&pool, source, now)?;
        let displaced = displaced.and_then(|id| self.close(id, Rejection::Displaced));
        self.sides[class as usize].pools[stage as usize].add(source, id, now);
        Ok(displaced)
    }

    fn leave_pool(&mut self, id: Id) {
        if let Some(Entry { source, class, stage: Some(stage), .. }) = self.entries.get(&id) {
            self.sides[*class as usize].pools[*stage as usize].remove(*source, id);
        }
    }

    fn begin_handshake(&mut self, source: IpAddr, class: Class, now: Instant) -> Result<(), Rejection> {
        let source_rate = self.bounds(class).source_rate;
        let side = &mut self.sides[class as usize];
        // The total comes first: it limits the number of sources with a bucket.
        if !side.all.has_token(now) {
            return Err(Rejection::TooOften);
        }
        let each = side.each.entry(source).or_insert_with(|| TokenBucket::new(source_rate, now));
        // A refusal for the source's rate takes no token from the other sources.
        if !each.take(now) {
            return Err(Rejection::TooOften);
        }
        side.all.take(now);
        Ok(())
    }

    fn bounds(&self, class: Class) -> &Bounds {
        match class {
            Class::Known => &self.limits.known,
            Class::Stranger => &self.limits.strangers,
        }
    }

    fn pool(&self, class: Class, stage: Stage) -> &Pool {
        let bounds = self.bounds(class);
        match stage {
            Stage::Silent => &bounds.silent,
            Stage::Handshake => &bounds.handshake,
            Stage::Anonymous => &bounds.anonymous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> GateLimits {
        let pool = |deadline| Pool { total: 6, per_source: 3, deadline };
        let rate = Rate { per_second: 1.0, burst: 100.0 };
        let bounds = Bounds {
            silent: pool(SECOND),
            handshake: pool(2 * SECOND),
            anonymous: pool(5 * SECOND),
            rate,
            source_rate: Rate { per_second: 1.0, burst: 4.0 },
        };
        GateLimits { known: bounds, strangers: bounds }
    }

    fn source(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number])
    }

    struct Port {
        table: Table<u32>,
        now: Instant,
        made: u32,
    }

    impl Port {
        fn new() -> Self {
            let now = Instant::now();
            Self { table: Table::new(limits(), now), now, made: 0 }
        }

        /// Its id, and the number of the connection that it displaces.
        fn enter(&mut self, from: u8, class: Class) -> Result<(Id, Option<u32>), Rejection> {
            self.made += 1;
            let (id, displaced) = self.table.enter(source(from), class, self.made - 1, self.now)?;
            Ok((
                id,
                displaced.map(|(close, _, turned)| {
                    assert_eq!(turned, Rejection::Displaced);
                    close
                }),
            ))
        }

        fn stranger(&mut self, from: u8) -> Result<Option<u32>, Rejection> {
            self.enter(from, Class::Stranger).map(|(_, displaced)| displaced)
        }
    }

    #[test]
    fn source_at_its_limit_displaces_only_its_own_aged_ones() {
        let mut port = Port::new();
        for _ in 0..3 {
            assert_eq!(port.stranger(1), Ok(None));
        }
        assert_eq!(port.stranger(1), Err(Rejection::TooMany));
        assert_eq!(port.stranger(2), Ok(None));
        port.now += GRACE;
        assert_eq!(port.stranger(1), Ok(Some(0)));
        assert_eq!(port.table.len(), 4);
    }

    #[test]
    fn full_pool_displaces_from_the_largest_source() {
        let mut port = Port::new();
        for from in [1, 1, 1, 2, 2, 3] {
            assert_eq!(port.stranger(from), Ok(None));
        }
        assert_eq!(port.stranger(4), Ok(Some(0)), "the oldest of the source with three");
        assert_eq!(
            port.stranger(3),
            Err(Rejection::TooMany),
            "no source has more than the new one would have"
        );
        port.now += GRACE;
        assert_eq!(port.stranger(5), Ok(Some(1)), "now two sources have two each");
    }

    #[test]
    fn strangers_never_displace_known_sources_nor_later_stages() {
        let mut port = Port::new();
        let (known, _) = port.enter(9, Class::Known).unwrap();
        let (begun, _) = port.enter(1, Class::Stranger).unwrap();
        port.table.advance(begun, Stage::Handshake, port.now).unwrap();
        for _ in 0..20 {
            for from in 1..20 {
                let _ = port.stranger(from);
            }
            port.now += Duration::from_millis(10);
        }
        assert!(!port.table.is_refused(known) && !port.table.is_refused(begun));
        assert_eq!(port.table.len(), 6 + 2);
    }

    #[test]
    fn each_stage_before_authentication_has_a_deadline() {
        let mut port = Port::new();
        let (silent, _) = port.enter(1, Class::Stranger).unwrap();
        let (handshake, _) = port.enter(1, Class::Stranger).unwrap();
        let (anonymous, _) = port.enter(1, Class::Stranger).unwrap();
        let (agent, _) = port.enter(2, Class::Stranger).unwrap();
        port.table.advance(handshake, Stage::Handshake, port.now).unwrap();
        port.table.advance(anonymous, Stage::Anonymous, port.now).unwrap();
        assert!(port.table.authenticated(agent));
        let mut turned = Vec::new();
        for _ in 0..50 {
            port.now += Duration::from_millis(250);
            turned.extend(port.table.sweep(port.now).into_iter().map(|(_, _, turned)| turned.reason()));
        }
        assert_eq!(turned, ["no_client_hello", "handshake_timeout", "no_stream"]);
        assert!(port.table.is_refused(silent), "it is gone");
        assert_eq!(port.table.len(), 1);
        // Once its last stream is over it is like any connection without one.
        assert!(port.table.authenticated(agent));
        port.table.ended(agent, port.now).unwrap();
        port.table.refuse(agent, port.now);
        assert!(!port.table.is_refused(agent), "another stream is open");
        port.table.ended(agent, port.now).unwrap();
        port.table.refuse(agent, port.now);
        assert!(port.table.is_refused(agent));
        let closed = port.table.sweep(port.now + LINGER);
        assert_eq!(closed.into_iter().map(|(_, _, turned)| turned).collect::<Vec<_>>(), [Rejection::Refused]);
        assert_eq!(port.table.len(), 0);
    }

    #[test]
    fn handshakes_have_a_rate_per_source() {
        let mut port = Port::new();
        let begin = |port: &mut Port, from| {
            let (id, _) = port.enter(from, Class::Stranger)?;
            let begun = port.table.advance(id, Stage::Handshake, port.now).map(drop);
            port.table.leave(id);
            begun
        };
        for _ in 0..4 {
            assert_eq!(begin(&mut port, 1), Ok(()));
        }
        assert_eq!(begin(&mut port, 1), Err(Rejection::TooOften));
        assert_eq!(begin(&mut port, 2), Ok(()), "another source has its own");
        assert_eq!(port.table.len(), 0);
        port.now += 4 * SECOND;
        port.table.sweep(port.now);
        assert!(port.table.sides[Class::Stranger as usize].each.is_empty(), "nothing is remembered");
        assert_eq!(begin(&mut port, 1), Ok(()));
    }
}
