//! Minimum interval between publications, so that a busy fleet gets fewer and larger updates. Pure: time is an
//! argument.
//!
//! A publication starts a round: every connected node that it concerns gets an update. The next publication waits for
//! a multiple of the time in which half of these nodes acknowledged. A fast round therefore delays nothing, and an
//! overloaded controller compiles, wakes and sends once per round, for however many changes have arrived.
//!
//! Invariants:
//! * A change after a pause is published at once.
//! * No publication waits longer than [`PacerLimits::maximum`], even if no node acknowledges.

use std::time::{Duration, Instant};

/// Bounds of the interval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacerLimits {
    /// Minimum number of nodes in a round. Publications for fewer nodes are not limited.
    pub nodes: usize,
    /// Multiple of the time in which half of the nodes acknowledged.
    pub factor: u32,
    /// Intervals below this are not worth a delay.
    pub minimum: Duration,
    /// Maximum interval.
    pub maximum: Duration,
}

impl Default for PacerLimits {
    fn default() -> Self {
        Self { nodes: 64, factor: 5, minimum: Duration::from_millis(20), maximum: Duration::from_millis(750) }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Round {
    revision: u64,
    began: Instant,
    /// Time in which half of the nodes acknowledged; `None` until then.
    half: Option<Duration>,
}

/// Computes the earliest time of the next publication.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pacer {
    limits: PacerLimits,
    round: Option<Round>,
}

impl Pacer {
    /// Creates a pacer without a round.
    #[must_use]
    pub fn new(limits: PacerLimits) -> Self {
        Self { limits, round: None }
    }

    /// Records a publication that concerns this many connected nodes.
    pub fn published(&mut self, revision: u64, nodes: usize, now: Instant) {
        if nodes >= self.limits.nodes {
            self.round = Some(Round { revision, began: now, half: None });
        }
    }

    /// Records that half of the nodes hold a revision. Returns true if this may end a delay.
    pub fn half_reached(&mut self, revision: u64, now: Instant) -> bool {
        match &mut self.round {
            Some(round) if round.half.is_none() && round.revision <= revision => {
                round.half = Some(now.saturating_duration_since(round.began));
                true
            }
            _ => false,
        }
    }

    /// Returns the earliest time of the next publication; `None` if it need not wait.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let round = self.round.as_ref()?;
        let PacerLimits { factor, minimum, maximum, .. } = self.limits;
        let interval = round.half.map_or(maximum, |half| (half * factor).min(maximum));
        (interval >= minimum).then(|| round.began + interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// A fleet behind a controller that delivers `capacity` updates per second, one update per node at a time.
    struct Simulation {
        nodes: usize,
        /// Time of one update.
        cost: Duration,
        /// Changes per second.
        rate: u32,
    }

    /// Result of a simulation.
    #[derive(Debug)]
    struct Load {
        updates_per_node: f64,
        publications: u32,
        /// Maximum time from a change to the last node, in each quarter of the time.
        lag: [Duration; 4],
    }

    impl Simulation {
        /// Each publication is delivered to all nodes in a row; a publication that comes before the end of the
        /// previous round waits for it, as the sessions do.
        fn run(&self, duration: Duration) -> Load {
            let start = Instant::now();
            let mut pacer = Pacer::default();
            let period = Duration::from_secs(1) / self.rate;
            let mut load = Load { updates_per_node: 0.0, publications: 0, lag: [Duration::ZERO; 4] };
            let (mut change, mut free) = (start, start);
            while change < start + duration {
                // Every change until the publication is part of it.
                let publication = pacer.next().map_or(change, |at| at.max(change));
                load.publications += 1;
                let revision = u64::from(load.publications);
                pacer.published(revision, self.nodes, publication);
                let begin = publication.max(free);
                let half = begin + self.cost * (self.nodes / 2) as u32;
                free = begin + self.cost * self.nodes as u32;
                pacer.half_reached(revision, half);
                let quarter = ((change - start).as_secs_f64() / duration.as_secs_f64() * 4.0) as usize;
                load.lag[quarter.min(3)] = load.lag[quarter.min(3)].max(free - change);
                load.updates_per_node += 1.0;
                while change <= publication {
                    change += period;
                }
            }
            load
        }
    }

    #[test]
    fn lag_settles_and_updates_follow_rounds_not_changes() {
        for (nodes, microseconds) in [(500, 200), (1_000, 100), (2_000, 100), (5_000, 100)] {
            for rate in [100, 1_000] {
                let simulation = Simulation { nodes, cost: Duration::from_micros(microseconds), rate };
                let load = simulation.run(Duration::from_secs(60));
                let round = simulation.cost * nodes as u32;
                let interval = (round * 5 / 2).min(PacerLimits::default().maximum);
                let most = 60.0 / interval.as_secs_f64() + 2.0;
                assert!(load.updates_per_node <= most, "{nodes} nodes, {rate}/s: {load:?}");
                assert!(load.lag[3] <= load.lag[1] + MILLISECOND, "lag grows: {load:?}");
                assert!(load.lag[3] <= interval + round + MILLISECOND * 20, "{load:?}");
            }
        }
    }

    #[test]
    fn cost_per_change_falls_with_the_rate() {
        let cost = |rate| {
            let simulation = Simulation { nodes: 1_000, cost: Duration::from_micros(100), rate };
            let load = simulation.run(Duration::from_secs(30));
            load.updates_per_node / f64::from(rate * 30)
        };
        assert!(cost(100) < cost(10) / 5.0 && cost(1_000) < cost(100) / 5.0);
    }

    #[test]
    fn change_after_a_pause_is_published_at_once() {
        let start = Instant::now();
        let mut pacer = Pacer::default();
        assert_eq!(pacer.next(), None);
        pacer.published(1, 1_000, start);
        pacer.half_reached(1, start + MILLISECOND * 30);
        assert_eq!(pacer.next(), Some(start + MILLISECOND * 150));
    }

    #[test]
    fn fast_rounds_and_few_nodes_delay_nothing() {
        let start = Instant::now();
        let mut pacer = Pacer::default();
        pacer.published(1, 63, start);
        assert_eq!(pacer.next(), None);
        pacer.published(2, 64, start);
        assert!(pacer.half_reached(2, start + MILLISECOND * 2));
        assert_eq!(pacer.next(), None);
        assert!(!pacer.half_reached(2, start + MILLISECOND * 900), "only the first time counts");
    }

    #[test]
    fn silent_nodes_delay_by_the_maximum() {
        let start = Instant::now();
        let mut pacer = Pacer::default();
        pacer.published(7, 64, start);
        assert_eq!(pacer.next(), Some(start + PacerLimits::default().maximum));
        assert!(!pacer.half_reached(6, start), "an earlier round");
        assert!(pacer.half_reached(7, start + Duration::from_secs(5)));
        assert_eq!(pacer.next(), Some(start + PacerLimits::default().maximum));
    }
}
