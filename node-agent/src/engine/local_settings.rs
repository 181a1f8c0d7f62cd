//! Settings that live outside nftables: sysctls, the log level, and the listener of the drain gate.

use switchtower_proto::v1::{LocalDetection, NodeRecord, ProxyMode, Settings};

use super::Engine;
use crate::drain::GateSettings;
use crate::health::address;

impl Engine {
    /// Applies the settings that live outside nftables. Returns whether a condition that no generation covers changed.
    pub(super) fn apply_local_settings(&mut self) -> bool {
        let Some(settings) = self.state.settings() else { return false };
        let conntrack = settings.conntrack.unwrap_or_default();
        let active = settings.mode() == ProxyMode::Active;
        let sysctls = &mut self.parts.sysctls;
        let unset_changed = if active {
            sysctls.apply(&conntrack, &self.parts.metrics)
        } else {
            sysctls.leave(&self.parts.metrics)
        };
        let port = u16::try_from(settings.drain_gate_port).ok().filter(|port| active && *port != 0);
        let node_addresses = self.state.node().into_iter().flat_map(|node| &node.addresses);
        let node_addresses = node_addresses.filter_map(|octets| address(octets)).collect();
        let gate = GateSettings { port, node_addresses };
        self.parts.drain_gate.send_if_modified(|current| {
            let changed = *current != gate;
            *current = gate;
            changed
        });
        let undetected = port.is_some() && !detects_pods(settings, self.state.node());
        let gate_changed = std::mem::replace(&mut self.conditions.pods_undetected, undetected) != undetected;
        if self.parts.log.apply(&settings.log_level) {
            self.progress.summarize_next();
        }
        unset_changed || gate_changed
    }
}

/// Returns whether the settings recognise pods of the node.
fn detects_pods(settings: &Settings, node: Option<&NodeRecord>) -> bool {
    match settings.local_detection() {
        LocalDetection::NodeCidr => node.is_some_and(|node| !node.pod_cidrs.is_empty()),
        LocalDetection::ClusterCidr => !settings.cluster_cidrs.is_empty(),
        LocalDetection::BridgeInterface | LocalDetection::InterfaceNamePrefix => {
            !settings.interface.is_empty()
        }
        LocalDetection::None | LocalDetection::Unspecified => false,
    }
}
