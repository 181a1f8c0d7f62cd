//! Held items in the snapshot file.

use prost::Message;
use switchtower_proto::v1::{Endpoint, Frontend, HealthCheck, LocalEndpoint, PoolKey};

use super::super::pack::{Malformed, PackedEndpoint, PackedFrontend, pack_pool};
use super::super::{RefusedUpdate, State};
use super::{HeldFrontend, HeldPool};

/// A held pool or frontend.
#[derive(Clone, PartialEq, Message)]
pub struct HeldItem {
    /// Generation that would have removed it.
    #[prost(uint64, tag = "1")]
    since: u64,
    #[prost(message, optional, tag = "2")]
    frontend: Option<Frontend>,
    #[prost(message, optional, tag = "3")]
    pool: Option<PoolKey>,
    #[prost(message, repeated, tag = "4")]
    members: Vec<Endpoint>,
}

/// Everything that is held, for a restart.
#[derive(Clone, PartialEq, Message)]
pub struct StoredHolds {
    #[prost(message, repeated, tag = "1")]
    items: Vec<HeldItem>,
    #[prost(message, repeated, tag = "2")]
    local_endpoints: Vec<LocalEndpoint>,
    #[prost(message, repeated, tag = "3")]
    health_checks: Vec<HealthCheck>,
    #[prost(uint64, tag = "4")]
    release_before: u64,
}

impl State {
    /// Returns the held items for the snapshot file.
    pub fn stored_holds(&self) -> StoredHolds {
        let (holds, ports) = (&self.holds, &self.ports);
        let pools = holds.pools.iter().map(|(id, held)| HeldItem {
            since: held.since,
            pool: Some(ports.key(*id)),
            members: held.members.iter().map(PackedEndpoint::unpack).collect(),
            ..HeldItem::default()
        });
        let frontends = holds.frontends.iter().map(|(id, held)| HeldItem {
            since: held.since,
            frontend: Some(held.frontend.unpack(id, ports)),
            ..HeldItem::default()
        });
        StoredHolds {
            items: pools.chain(frontends).collect(),
            local_endpoints: holds.local_endpoints.iter().cloned().collect(),
            health_checks: holds.health_checks.values().cloned().collect(),
            release_before: holds.release_before,
        }
    }

    /// Holds again what a restarted agent held.
    ///
    /// # Errors
    /// An item is malformed; earlier ones are held.
    pub fn restore_holds(&mut self, stored: &StoredHolds) -> Result<(), RefusedUpdate> {
        for HeldItem { since, frontend, pool, members } in &stored.items {
            if let Some(frontend) = frontend {
                let (id, frontend) = PackedFrontend::pack(frontend, &mut self.ports)?;
                self.holds.insert_frontend(id, HeldFrontend { frontend, since: *since }, &mut self.ports);
            }
            if let Some(key) = pool {
                let id = pack_pool(key, &mut self.ports)?;
                let members = members.iter().map(|member| PackedEndpoint::pack(id.family, member));
                let held = HeldPool { members: members.collect::<Result<_, Malformed>>()?, since: *since };
                self.holds.insert_pool(id, held, &mut self.ports);
            }
        }
        self.holds.present.keep(self.holds.len());
        let checks = stored.health_checks.iter();
        let checks = checks.filter_map(|check| Some((check.key.clone()?, check.clone())));
        self.holds.health_checks = checks.collect();
        self.holds.local_endpoints = stored.local_endpoints.iter().cloned().collect();
        self.holds.release_before = stored.release_before;
        self.ports.sweep();
        Ok(())
    }
}
