//! The place of an agent at the start of its stream.

use switchtower_core::wire;
use switchtower_proto::digest::Digest;
use switchtower_proto::v1::Hello;

use super::{Session, bounded};
use crate::status::{News, Observation};
use crate::text::sanitized;

impl Session {
    /// Finds the agent's position in the log, and the high-water mark of its generations.
    pub(super) fn resume(&mut self, hello: &Hello, floor: u64) {
        let kernel = hello.kernel.as_ref().map_or(0, |stamp| stamp.generation);
        let view = hello.view.as_ref();
        self.generation = view.map_or(0, |view| view.generation);
        self.highest = floor.max(kernel).max(self.generation);
        self.kernel_at_hello = hello
            .kernel
            .as_ref()
            .and_then(|stamp| Some((stamp.generation, Digest::from_bytes(&stamp.digest)?)));
        self.cursor = view.and_then(|view| {
            let digest = Digest::from_bytes(&view.digest)?;
            let revision = self.fleet.resumable(view.resume.as_ref());
            // If the assignment changed while the agent was disconnected, its view is of the previous one.
            let last = self.fleet.last_place(&self.node);
            self.fleet.read(|layers| {
                let resume = |subscription| layers.resume(subscription, revision, digest);
                resume(&self.subscription).or_else(|| resume(last.as_ref()?.subscription()))
            })
        });
        let (generation, highest) = (self.generation, self.highest);
        self.unproven = self
            .cursor
            .as_ref()
            .is_some_and(|cursor| self.kernel_at_hello != Some((generation, cursor.digest())));
        let applied = if self.cursor.is_none() || self.unproven { kernel } else { generation };
        let settings = self.cursor.as_ref().map(|cursor| cursor.subscription().settings.clone());
        let (deviations, trial, mode) = (hello.deviations.clone(), hello.trial.clone(), hello.mode());
        let change = |known: &mut Observation| {
            known.note_connected();
            known.acknowledged = false;
            known.applied = applied;
            known.sent = highest;
            known.desired = highest;
            known.failure = None;
            known.agent_version = sanitized(&hello.agent_version);
            known.kernel_version = sanitized(&hello.kernel_version);
            known.addresses =
                hello.addresses.iter().take(64).filter_map(|octets| wire::address(octets)).collect();
            if known.settings != settings {
                known.settings_took = None;
            }
            known.settings = settings;
            known.deviations = deviations.map(bounded::deviations);
            known.trial = trial.map(bounded::trial);
            known.mode = mode;
            News::Transition
        };
        match &self.cursor {
            Some(cursor) => self.fleet.reached(&self.node, self.number, cursor, None, change),
            None => self.fleet.observe_with(&self.node, self.number, change),
        }
    }
}
