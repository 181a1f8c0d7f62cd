//! Catalogue of the message codes that kubectl-switchtower prints. docs/codes.md is generated from it.
//!
//! Invariants: a code never changes its meaning, and a retired code is never reused.

/// A code of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// `ST0` and three digits: 1 nodes, 2 Services, 3 the controller, 4 the cluster around it.
    pub code: &'static str,
    /// Problem, in a few words.
    pub title: &'static str,
    /// Consequences.
    pub meaning: &'static str,
    /// Solution, in the imperative.
    pub action: &'static str,
}

macro_rules! codes {
    ($($name:ident = $code:literal, $title:literal, $meaning:literal, $action:literal;)*) => {
        $(#[doc = $title] pub const $name: Code =
            Code { code: $code, title: $title, meaning: $meaning, action: $action };)*
        /// All codes, in ascending order.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

codes! {
    AGENT_ABSENT = "ST0101", "no agent has connected from this node",
        "Nothing programs Services on the node: its pods reach ClusterIPs only if another proxy serves them.",
        "Run kubectl -n switchtower-system get pods -o wide and inspect the agent's pod. Check whether the node is \
         tainted or out of capacity.";
    AGENT_DISCONNECTED = "ST0102", "the agent is not connected",
        "The kernel keeps its rules and continues to forward traffic, but receives no changes: connections may \
         still go to endpoints that were removed.",
        "Inspect the agent's pod and its log on that node. An agent that reconnects receives all missed changes.";
    NODE_BEHIND = "ST0103", "the node has not applied the latest changes",
        "The agent is connected and has not acknowledged the latest update. A delay of a second or two is normal.",
        "If the delay persists, read the agent's log and check whether the node is short of CPU.";
    APPLY_FAILED = "ST0104", "the agent or its kernel rejected an update",
        "The node keeps the previous generation unchanged. The agent retries automatically.",
        "Check the error number: EPERM means that CAP_NET_ADMIN is missing, ENOMEM that the node is out of memory. \
         The agent's log has the details.";
    DEVIATING = "ST0105", "the kernel deliberately differs from the view",
        "The kernel rejected single items, or the agent holds back removals. Everything else is programmed.",
        "Run kubectl get pxs NODE -o yaml: status.deviations lists the items.";
    FOREIGN_CHANGE = "ST0106", "another program changed the agent's tables",
        "The agent detected and repaired the change. Connections may have failed until then.",
        "Find the program that runs nft flush ruleset or restarts a firewall service on the node, and exclude table \
         switchtower from it.";
    NOT_EXCLUSIVE = "ST0107", "another service proxy's rules are on the node",
        "Both proxies translate the same packets; the hook priorities decide which one wins.",
        "Stop kube-proxy on the node and remove its rules; docs/migration.md lists the commands.";
    KERNEL_DIFFERS = "ST0108", "the kernel does not match the desired state",
        "The node's tables differ from what the controller computed for the node.",
        "Run kubectl switchtower diff NODE to list the differences. The agent repairs foreign changes at once; if a \
         difference persists, restart the agent, which resyncs all tables.";
    KERNEL_UNKNOWN = "ST0109", "the node's kernel could not be queried",
        "The output shows what the controller computed; the kernel's state is unknown.",
        "Run kubectl switchtower status to see why the node is not connected.";
    PODS_NOT_LOCAL = "ST0110", "local detection misses pods of the node",
        "The node does not recognize these pods as local: their connections to ClusterIPs lose their source \
         address, so NetworkPolicies that select them stop matching, and externalTrafficPolicy Local has no \
         short-circuit for them.",
        "Set localDetection in a ProxyProfile to match the CNI: the cluster's CIDRs (mode ClusterCIDR) or the \
         prefix of its interface names (mode InterfaceNamePrefix). The row's condition LocalDetection lists \
         addresses.";
    AGENT_AWAITED = "ST0111", "the controller has not heard from the agent yet",
        "The controller or the row is new. The kernel keeps its rules; its state is unknown.",
        "Wait: agents reconnect within seconds. After 45 seconds the row reports why the agent is absent.";
    NODE_DOWN = "ST0112", "the node is down or unreachable",
        "Neither the kubelet nor the agent reports: the machine is down or cut off from the control plane.",
        "Run kubectl describe node NODE. Switchtower needs no action.";
    SETTINGS_ON_TRIAL = "ST0113", "the node is trying new settings",
        "A rollout assigned a revision to the node; the node keeps it only if its probes pass.",
        "Run kubectl switchtower rollout status to see the rollout's progress.";
    SETTINGS_ROLLED_BACK = "ST0114", "the node returned to its previous settings",
        "The node rejected the assigned revision, or its probes failed with it. The previous settings are in force.",
        "Run kubectl switchtower rollout status to see what failed on the node.";
    DELETIONS_HELD = "ST0115", "the agent holds back removals",
        "Within a minute, more than 100 and a fifth of the node's frontends and pools would have vanished or become \
         empty. They are still programmed, so traffic to backends that still run continues.",
        "Run kubectl get pxs NODE -o yaml: status.deviations lists the removals. If they are a mistake, restore the \
         objects, which ends the hold. If they are intended, run kubectl switchtower release-held NODE.";
    ROW_OUTDATED = "ST0116", "the row is out of date",
        "No controller has renewed the row in time, so it shows an earlier state. Nodes keep their rules.",
        "Run kubectl -n switchtower-system get pods and check that a controller is running. If it is, its log shows \
         why it cannot write ProxyStatus. A wrong clock on its node has the same effect.";
    NO_ENDPOINTS = "ST0201", "the Service has no usable endpoint",
        "Every node rejects new connections immediately.",
        "Check that the selector matches pods (kubectl get pods -l ...), that they are Ready, and that targetPort \
         names one of their ports.";
    NO_LOCAL_ENDPOINTS_INSIDE = "ST0202", "no endpoint on this node, and internalTrafficPolicy is Local",
        "Connections to the ClusterIP from this node are dropped: the client times out.",
        "Run a pod of the Service on the node (a DaemonSet), or set internalTrafficPolicy: \
         Cluster.";
    NO_LOCAL_ENDPOINTS_OUTSIDE = "ST0203", "no endpoint on this node, and externalTrafficPolicy is Local",
        "Connections from outside the cluster that arrive at this node are dropped: the client times out. A load \
         balancer that probes healthCheckNodePort avoids such nodes.",
        "Send traffic only to nodes with endpoints, run a pod on the node, or set externalTrafficPolicy: Cluster.";
    SOURCE_RANGE = "ST0204", "the source is not in loadBalancerSourceRanges",
        "Connections to the load balancer's address from other sources are dropped, pods included. NodePorts, \
         externalIPs and the ClusterIP are not restricted.",
        "Add the source's range to spec.loadBalancerSourceRanges, or use the ClusterIP inside the cluster.";
    UNDEFINED_PORT = "ST0205", "the ClusterIP has no such port",
        "Connections to this port are rejected immediately.",
        "Use a port that kubectl get service lists, or add it to spec.ports.";
    UNALLOCATED_ADDRESS = "ST0206", "no Service has this address",
        "The address is inside a ServiceCIDR; packets to it are dropped.",
        "Resolve the Service's name again: the Service was deleted, or recreated with another address.";
    NOT_SERVED = "ST0207", "Switchtower does not serve this Service",
        "The Service is headless, of type ExternalName, labeled for another proxy, or all its addresses belong to \
         older Services.",
        "Run kubectl describe service to see its type, labels and Events; AddressConflict names the Service that \
         has the address.";
    CONTROLLER_UNREACHABLE = "ST0301", "the controller cannot be reached",
        "Nodes keep their rules. While the controller is down, rows may be stale and nodes receive no changes.",
        "Run kubectl -n switchtower-system get pods, then read the log of switchtower-controller.";
    UPSTREAM_STALE = "ST0302", "the controller has not heard from the API server recently",
        "The controller receives no changes of Services and endpoints; nodes keep their rules.",
        "Check that the API server responds, and read the controller's log.";
    VERSION_SKEW = "ST0303", "agents of several versions are running",
        "An upgrade is in progress or has stopped. Adjacent versions work together.",
        "Run kubectl -n switchtower-system rollout status daemonset/switchtower-node-agent.";
    NO_NODE_CONNECTED = "ST0304", "no node is connected",
        "No node is connected, so there is nothing to wait for.",
        "If kubectl get proxystatus lists rows, they show why each agent is absent. Otherwise check the \
         controller's log and whether its --node-selector matches any Node.";
    NOT_REACHED = "ST0305", "some nodes have not applied the change in time",
        "These nodes still use their previous rules.",
        "Run kubectl switchtower status to list the nodes and the reasons.";
    CONTROLLER_NOT_LISTENING = "ST0306", "the controller cannot accept agents",
        "No agent can connect; all nodes keep their rules.",
        "Read the row's message, which has the address and the error. Check whether another process on the \
         controller's node uses the port.";
    PROFILE_STALLED = "ST0307", "a profile's settings are not in force",
        "The rollout failed, was aborted or makes no progress. Nodes have the previous settings, or some of them \
         have the new ones.",
        "Run kubectl switchtower rollout status to list the failed nodes and the reasons. Correct the profile: each \
         change of its spec starts a new rollout.";
    PROFILES_OVERLAP = "ST0308", "profiles select the same nodes",
        "The profile with the highest priority applies to such a node; at equal priority, the oldest one.",
        "Set different priorities, or use selectors that do not overlap.";
    GATE_PORT_USED = "ST0309", "pods listen on the port of the drain gate",
        "Connections from a node to this port of its pods reach the agent instead of the pod: probes of the kubelet \
         and requests of host processes fail. Connections through Services are not affected.",
        "Set spec.settings.drainGate.port of the profile and the hooks to a port on which no pod listens.";
    NOT_INSTALLED = "ST0401", "a custom resource is not installed",
        "Without ProxyStatus the cluster shows no state of Switchtower; without ProxyProfile and ProxyRollout its \
         settings cannot be changed.",
        "Run kubectl apply -k manifests/.";
    KUBE_PROXY_RUNS = "ST0402", "kube-proxy is installed in this cluster",
        "Both proxies would program Services on the same nodes.",
        "Install Switchtower alongside kube-proxy, wait until every row is Ready, then remove kube-proxy and its \
         rules; docs/migration.md lists the commands.";
    KERNEL_TOO_OLD = "ST0403", "a node's kernel is older than the tested versions",
        "The kernel may reject the tables.",
        "Upgrade the node's kernel to a version that the README lists as tested.";
    NO_RIGHT = "ST0404", "a permission is missing",
        "The command cannot query the cluster without it.",
        "Ask an administrator to bind the Role switchtower-viewer or switchtower-operator to your user.";
    API_SERVER_BY_SERVICE = "ST0405", "the controller reaches the API server through a Service",
        "After a full restart of the cluster, the Service depends on the controller and the controller on the \
         Service.",
        "Create the ConfigMap switchtower-api-server with the API server's host and port; see manifests/README.md.";
    API_SERVER_TOO_OLD = "ST0406", "the API server is too old",
        "The controller needs ServiceCIDR v1 and integer resourceVersions.",
        "Upgrade the control plane to Kubernetes 1.33 or newer.";
    NODE_WITHOUT_ADDRESS = "ST0407", "a Node has no InternalIP",
        "The node does not serve NodePorts and cannot identify its own traffic.",
        "Run kubectl get node NAME -o yaml and check status.addresses, which the kubelet or the cloud controller \
         sets.";
    NODE_WITHOUT_POD_CIDR = "ST0408", "a Node has no podCIDR",
        "With localDetection NodeCIDR the node cannot recognize local pods: ClusterIP traffic is not masqueraded, \
         and externalTrafficPolicy Local has no short-circuit for pods.",
        "Create a ProxyProfile with another localDetection mode, such as InterfaceNamePrefix or ClusterCIDR.";
    NOT_LOOKED_AT = "ST0409", "a check could not run",
        "The result of this check is unknown.",
        "If a permission is missing, run the check as a cluster administrator.";
    OTHER_PROXY = "ST0410", "the network plugin serves Services itself",
        "The plugin and Switchtower would translate the same packets. Packets that the plugin handles before the \
         nf_tables hooks never reach Switchtower.",
        "Use only one of them. To use Switchtower, disable the plugin's proxy: Cilium kubeProxyReplacement false, \
         Calico bpfEnabled false, Antrea proxyAll false, kube-router --run-service-proxy=false.";
    KUBEADM_BRINGS_BACK = "ST0411", "kubeadm will reinstall kube-proxy",
        "kubeadm upgrade installs the DaemonSet kube-proxy again, on every node.",
        "Run kubectl -n kube-system edit configmap kubeadm-config and add `proxy: {disabled: true}` to \
         ClusterConfiguration (kubeadm 1.31 and newer).";
    PORT_TAKEN = "ST0412", "a port that Switchtower needs is in use",
        "The controller listens on 9443, 9444 and 9445, agents on 9446, 10249 and 10256, all of them ports of the node.",
        "Move the other program, or choose other ports with the flags of the controller and the agents.";
    SETTINGS_NOT_TAKEN_OVER = "ST0413", "the built-in settings may differ from kube-proxy's",
        "Nodes without a ProxyProfile may recognize other pods as local, or serve NodePorts on other addresses, \
         than with kube-proxy.",
        "Compare ConfigMap switchtower-builtin-settings with kube-proxy's configuration and create a ProxyProfile \
         with the settings you need; see docs/migration.md.";
    FIREWALLS = "ST0414", "kube-proxy opened the hosts' firewalls",
        "With FORWARD policy DROP (Docker sets it) or firewalld, connections that kube-proxy accepted may be \
         dropped after its rules are removed.",
        "Add the rules listed in docs/migration.md, section Firewalls, before you remove kube-proxy.";
    KUBE_PROXY_ON_HOST = "ST0415", "kube-proxy may run outside of the API server's view",
        "Both proxies would program Services on the same nodes.",
        "On k3s and RKE2, set disable-kube-proxy: true in the servers' configuration. Otherwise stop the program on \
         each node. docs/migration.md shows how to remove its rules.";
    LOCALHOST_NODE_PORTS = "ST0416", "NodePorts on 127.0.0.1 will stop working",
        "Connections of host processes to a NodePort through localhost are rejected.",
        "Change these processes to use the node's address or the ClusterIP.";
    CRD_TERMINATING = "ST0417", "a custom resource is being deleted",
        "The resource's definition was deleted. Objects can no longer be created, and all existing ones are deleted \
         with it.",
        "Wait until the deletion finishes, then run kubectl apply -k manifests/. If it does not finish, objects \
         with a finalizer are left: see manifests/README.md, section Uninstalling.";
    KUBE_PROXY_MANAGED = "ST0418", "another program manages kube-proxy's DaemonSet",
        "The program reverts the change that keeps kube-proxy off nodes that have moved: kube-proxy returns to them.",
        "Pause the program for this object (Argo CD: disable automated sync; Flux: suspend), and remove kube-proxy from \
         its source after the migration. Managed clusters may not allow it.";
    IPVS_SCHEDULER = "ST0419", "an IPVS scheduler has no counterpart",
        "Switchtower selects endpoints at random with equal weights, as kube-proxy's other modes do.",
        "Check that no Service depends on the scheduler, for example on lc or sh; use sessionAffinity for the latter.";
    MIGRATION_PROFILES = "ST0420", "other ProxyProfiles exist",
        "The profile of the migration would replace their settings on the nodes that move.",
        "Set mode Active or Shadow in your own profiles instead of using kubectl switchtower migrate, or delete them \
         until the migration is finished.";
    PROXIES_DIFFER = "ST0421", "kube-proxy and Switchtower treat Services differently",
        "New connections to these frontends get another result once Switchtower serves the node.",
        "Run kubectl switchtower compare NODE again: changes in progress cause temporary differences. docs/parity.md lists \
         intended ones.";
}

/// Looks up a code; case is ignored.
pub fn find(code: &str) -> Option<&'static Code> {
    CODES.iter().find(|known| known.code.eq_ignore_ascii_case(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_sorted_and_complete() {
        for pair in CODES.windows(2) {
            assert!(pair[0].code < pair[1].code, "{} before {}", pair[0].code, pair[1].code);
        }
        for code in CODES {
            assert!(code.code.len() == 6 && code.code.starts_with("ST0"), "{}", code.code);
            assert!(!code.title.ends_with('.') && code.meaning.ends_with(['.', '!']), "{}", code.code);
            assert!(!code.action.is_empty());
        }
        assert_eq!(find("st0201"), Some(&NO_ENDPOINTS));
        assert_eq!(find("ST9999"), None);
    }
}
