//! A fleet of two replicas whose connections pass through forwarders, so that a test can cut them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use super::controllers::SECOND_PORT;
use super::{CONTROLLER_PORT, Fleet, FleetNode, NodeSpec};
use crate::lab::forwarder::{Condition, Forwarder};

/// Distance of a forwarder's port from the port of its replica.
const OFFSET: u16 = 100;

/// The forwarders of one replica.
#[derive(Debug)]
struct Links {
    to_api_server: Forwarder,
    /// Of agents and the other replica.
    from_agents: Forwarder,
}

/// The forwarders of both replicas.
#[derive(Debug)]
pub(super) struct LinkedReplicas([Links; 2]);

impl LinkedReplicas {
    fn start(fleet: &Fleet) -> Result<Self> {
        let root = fleet.lab().root_address();
        let links = |port: u16| -> Result<Links> {
            let api_server = fleet.control_plane().address();
            Ok(Links {
                to_api_server: Forwarder::start((api_server.ip(), 0).into(), api_server)?,
                from_agents: Forwarder::start((root, port + OFFSET).into(), (root, port).into())?,
            })
        };
        Ok(Self([links(CONTROLLER_PORT)?, links(SECOND_PORT)?]))
    }

    /// Address of the API server for a replica.
    pub(super) fn api_server(&self, replica: usize) -> SocketAddr {
        self.0[replica].to_api_server.address()
    }

    /// Address of a replica for agents and the other replica.
    pub(super) fn replica(&self, replica: usize) -> SocketAddr {
        self.0[replica].from_agents.address()
    }
}

impl Fleet {
    /// Starts a fleet with two replicas and links between them, the API server and the agents.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub fn start_linked(specs: &[NodeSpec]) -> Result<Self> {
        let mut fleet = Self::build(specs)?;
        fleet.links = Some(LinkedReplicas::start(&fleet)?);
        fleet.install()?;
        fleet.start_controller()?;
        fleet.start_second()?;
        fleet.start_agents()?;
        Ok(fleet)
    }

    fn links(&self, replica: usize) -> Result<&Links> {
        let links = self.links.as_ref().context("the fleet was not started with links")?;
        Ok(&links.0[replica])
    }

    /// Sets the condition of the link between a replica and the API server.
    ///
    /// # Errors
    /// The fleet has no links.
    pub fn set_upstream(&self, replica: usize, condition: Condition) -> Result<()> {
        self.links(replica)?.to_api_server.set(condition);
        Ok(())
    }

    /// Sets the condition of the links between an agent and all replicas.
    ///
    /// # Errors
    /// The fleet has no links.
    pub fn set_agent_links(&self, node: &FleetNode, condition: Condition) -> Result<()> {
        let address: IpAddr = node.net.address(false);
        (0..2).try_for_each(|replica| {
            self.links(replica)?.from_agents.set_client(address, condition);
            Ok(())
        })
    }

    /// Sets the condition of the links between the replicas.
    ///
    /// # Errors
    /// The fleet has no links.
    pub fn set_replica_links(&self, condition: Condition) -> Result<()> {
        let root = self.lab().root_address();
        (0..2).try_for_each(|replica| {
            self.links(replica)?.from_agents.set_client(root, condition);
            Ok(())
        })
    }

    /// Makes all links whole.
    pub fn heal_links(&self) {
        for links in self.links.iter().flat_map(|links| &links.0) {
            links.to_api_server.set(Condition::Whole);
            links.from_agents.set(Condition::Whole);
        }
    }
}
