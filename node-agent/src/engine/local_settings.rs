//! Settings that live outside nftables: sysctls, the log level, and the listener of the drain gate.

use switchtower_proto::v1::{LocalDetection, NodeRecord, Settings};

use super::Engine;

impl Engine {
    /// Applies the settings that live outside nftables. Returns whether a condition that no generation covers changed.
    pub(super) fn apply_local_settings(&mut self) -> bool {
        let Some(settings) = self.state.settings() else { return false };
        let conntrack = settings.conntrack.unwrap_or_default();
        let unset_changed = self.parts.sysctls.apply(&conntrack, &self.parts.metrics);
        let port = u16::try_from(settings.drain_gate_port).ok().filter(|port| *port != 0);
        self.parts.drain_gate.send_if_modified(|current| std::mem::replace(current, port) != port);
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
