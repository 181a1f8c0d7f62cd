//! The catalogue of message codes: what kubectl-switchtower says, what it means, and what to do.
//!
//! A code keeps its meaning for ever; one that is no longer used is not given out again. The page
//! docs/codes.md is this table.

/// A code of the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// `ST0` and three digits: 1 nodes, 2 Services, 3 the controller, 4 the cluster around it.
    pub code: &'static str,
    /// What was found, in a few words.
    pub title: &'static str,
    /// What follows from it.
    pub meaning: &'static str,
    /// What to do.
    pub action: &'static str,
}

macro_rules! codes {
    ($($name:ident = $code:literal, $title:literal, $meaning:literal, $action:literal;)*) => {
        $(#[doc = $title] pub const $name: Code =
            Code { code: $code, title: $title, meaning: $meaning, action: $action };)*
        /// All codes, in their order.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

codes! {
    AGENT_ABSENT = "ST0101", "no agent has come from this node",
        "Nothing programs Services on the node: its pods reach ClusterIPs only if another proxy serves them.",
        "Look at the agent's pod: kubectl -n switchtower-system get pods -o wide. Is the node tainted, or without room?";
    AGENT_DISCONNECTED = "ST0102", "the agent is not connected",
        "The kernel keeps the rules it has and traffic goes on, but no change arrives: endpoints that went away \
         meanwhile are still used.",
        "Look at the agent's pod and its log on that node; an agent that comes back catches up by itself.";
    NODE_BEHIND = "ST0103", "the node has not applied the latest changes",
        "The agent is connected and has not acknowledged what it was sent. A second or two is ordinary.",
        "If it lasts, read the agent's log, and see whether the node has CPU to spare.";
    APPLY_FAILED = "ST0104", "the agent or its kernel refused an update",
        "The node keeps the generation before, whole; the agent tries again by itself.",
        "The error number says why: EPERM needs CAP_NET_ADMIN, ENOMEM more memory. The agent's log has the details.";
    DEVIATING = "ST0105", "the kernel differs from the view on purpose",
        "Single items were refused or removals are held back; everything else is programmed.",
        "kubectl get pxs NODE -o yaml names the items under status.deviations.";
    FOREIGN_CHANGE = "ST0106", "somebody else changed the agent's tables",
        "The agent noticed and repaired it. In between, connections may have failed.",
        "Find who runs nft flush ruleset or restarts a firewall service on the node, and keep it off table switchtower.";
    NOT_EXCLUSIVE = "ST0107", "another service proxy's rules are on the node",
        "Both translate the same packets; which one wins depends on the hooks' priorities.",
        "Stop kube-proxy there and remove its rules; docs/migration.md has the commands.";
    KERNEL_DIFFERS = "ST0108", "the kernel does not hold what it should",
        "What was read from the node's tables differs from what the controller computed for it.",
        "kubectl switchtower diff NODE shows each difference. The agent repairs foreign changes at once; if it stays, \
         restart the agent: it compares and repairs everything.";
    KERNEL_UNKNOWN = "ST0109", "the node's kernel could not be asked",
        "The answer is what the controller computed; what the kernel holds is not known.",
        "See why the node is not connected: kubectl switchtower status.";
    PODS_NOT_LOCAL = "ST0110", "local detection misses pods of the node",
        "These pods are not recognised as local: their connections to ClusterIPs lose their source address, so \
         NetworkPolicies that select them stop matching, and externalTrafficPolicy Local has no short cut for them.",
        "Set localDetection in a ProxyProfile to what the CNI uses: the cluster's CIDRs (mode ClusterCIDR) or the \
         beginning of its interfaces' names (mode InterfaceNamePrefix). The row's condition LocalDetection names addresses.";
    AGENT_AWAITED = "ST0111", "the controller has not heard from the agent yet",
        "The controller or the row is new. The kernel keeps the rules it has; what it holds is not known.",
        "Agents reconnect within seconds; after 45 seconds the row says what keeps this one away.";
    NODE_DOWN = "ST0112", "the node itself does not report",
        "Its kubelet and its agent are both gone: the machine is down, or cut off from the control plane.",
        "kubectl describe node NODE. Nothing is to be done in Switchtower.";
    SETTINGS_ON_TRIAL = "ST0113", "the node is trying new settings",
        "A rollout gave it a revision; the node keeps it only if its probes pass.",
        "kubectl switchtower rollout status shows how far the rollout is.";
    SETTINGS_ROLLED_BACK = "ST0114", "the node went back to earlier settings",
        "It refused the assigned revision or its probes failed under it; the settings before are in force.",
        "kubectl switchtower rollout status shows what failed on the node.";
    DELETIONS_HELD = "ST0115", "the agent holds back removals",
        "An update would have removed more than the delete budget allows; frontends and endpoints that should be gone \
         are still programmed.",
        "kubectl get pxs NODE -o yaml names them under status.deviations; the agent's log says what held them back.";
    ROW_OUTDATED = "ST0116", "the row is out of date",
        "No controller has renewed it in time: it shows what was true then. Nodes keep their rules.",
        "Is a controller running? kubectl -n switchtower-system get pods. If one is, its log says why it cannot write \
         ProxyStatus; a wrong clock on its node looks the same.";
    NO_ENDPOINTS = "ST0201", "the Service has no usable endpoint",
        "New connections are refused at once, on every node.",
        "Does the selector match pods (kubectl get pods -l ...), are they Ready, and does targetPort name a port of theirs?";
    NO_LOCAL_ENDPOINTS_INSIDE = "ST0202", "no endpoint on this node, and internalTrafficPolicy is Local",
        "Connections to the ClusterIP from this node are dropped: the client times out.",
        "Run a pod of the Service on the node (a DaemonSet), or set internalTrafficPolicy: Cluster.";
    NO_LOCAL_ENDPOINTS_OUTSIDE = "ST0203", "no endpoint on this node, and externalTrafficPolicy is Local",
        "Connections from outside that arrive at this node are dropped: the client times out. A load balancer that \
         probes healthCheckNodePort does not send any.",
        "Send traffic only to nodes with endpoints, run a pod on the node, or set externalTrafficPolicy: Cluster.";
    SOURCE_RANGE = "ST0204", "the source is in none of loadBalancerSourceRanges",
        "Connections to the load balancer's address from other sources are dropped. Pods are not exempt; NodePorts, \
         externalIPs and the ClusterIP are not restricted.",
        "Add the source's range to spec.loadBalancerSourceRanges, or use the ClusterIP inside the cluster.";
    UNDEFINED_PORT = "ST0205", "the ClusterIP has no such port",
        "Connections to this port are refused at once.",
        "Use a port that kubectl get service shows, or add it to spec.ports.";
    UNALLOCATED_ADDRESS = "ST0206", "no Service has this address",
        "It is inside a ServiceCIDR; packets to it are dropped.",
        "Look the name up again: the Service was deleted or made anew with another address.";
    NOT_SERVED = "ST0207", "Switchtower does not serve this Service",
        "It is headless, of type ExternalName, labelled for another proxy, or all its addresses belong to older Services.",
        "kubectl describe service shows its type, labels and Events; AddressConflict names the Service that won.";
    CONTROLLER_UNREACHABLE = "ST0301", "the controller cannot be reached",
        "Nodes keep their rules. Rows may be old, and no change reaches a node while it is down.",
        "kubectl -n switchtower-system get pods; then the log of switchtower-controller.";
    UPSTREAM_STALE = "ST0302", "the controller has not heard from the API server for a while",
        "Changes of Services and endpoints do not arrive; nodes keep what they have.",
        "See whether the API server answers, and the controller's log.";
    VERSION_SKEW = "ST0303", "agents of several versions are running",
        "An upgrade is under way, or has stopped half-way. Versions next to each other work together.",
        "kubectl -n switchtower-system rollout status daemonset/switchtower-node-agent";
    NO_NODE_CONNECTED = "ST0304", "no node is connected",
        "Nothing can be said to have reached the fleet: 0 of 0 is not all.",
        "If kubectl get proxystatus shows rows, they say why each agent is away. If there are none, see the controller's \
         log and whether its --node-selector matches any Node.";
    NOT_REACHED = "ST0305", "some nodes have not applied the change in time",
        "They still use what they had before.",
        "kubectl switchtower status lists them with the reason.";
    CONTROLLER_NOT_LISTENING = "ST0306", "the controller cannot accept agents",
        "No agent can connect; all nodes keep the rules they have.",
        "The row's message names the address and the error; another process on the controller's node may have the port.";
    PROFILE_STALLED = "ST0307", "a profile's settings are not in force",
        "Its rollout failed, was aborted or does not get on; nodes have the settings before, or a part has the new ones.",
        "kubectl switchtower rollout status names the nodes that failed and why. Correct the profile: each change of its \
         spec starts a new rollout.";
    PROFILES_OVERLAP = "ST0308", "profiles select the same nodes",
        "Of two profiles for a node the one with the higher priority wins; at equal priority the older one.",
        "Give them different priorities, or selectors that do not overlap.";
    NOT_INSTALLED = "ST0401", "a custom resource is not installed",
        "Without ProxyStatus nothing of Switchtower shows in this cluster; without ProxyProfile and ProxyRollout no \
         settings can be changed.",
        "kubectl apply -k manifests/";
    KUBE_PROXY_RUNS = "ST0402", "kube-proxy is installed in this cluster",
        "Both would program Services on the same nodes.",
        "Install beside it, wait until every row is Ready, then remove kube-proxy and its rules: docs/migration.md has the \
         commands.";
    KERNEL_TOO_OLD = "ST0403", "a node's kernel is older than what is tested",
        "The tables may be refused there.",
        "The README says which kernels are tested.";
    NO_RIGHT = "ST0404", "a right is missing",
        "The command needs it to ask the cluster.",
        "An administrator can bind the Role switchtower-viewer or switchtower-operator to you.";
    API_SERVER_BY_SERVICE = "ST0405", "the controller reaches the API server through a Service",
        "After a restart of everything, the Service needs the controller and the controller the Service.",
        "Make the ConfigMap switchtower-api-server with the real host and port; manifests/README.md shows how.";
    API_SERVER_TOO_OLD = "ST0406", "the API server is too old",
        "The controller needs ServiceCIDR v1 and integer resourceVersions.",
        "Upgrade the control plane to 1.33 or newer.";
    NODE_WITHOUT_ADDRESS = "ST0407", "a Node has no InternalIP",
        "NodePorts are not served there, and nothing can be told from the node's own traffic.",
        "The kubelet or the cloud controller sets it: kubectl get node NAME -o yaml, status.addresses.";
    NODE_WITHOUT_POD_CIDR = "ST0408", "a Node has no podCIDR",
        "With localDetection NodeCIDR, local pods cannot be told there: ClusterIP traffic is not masqueraded, and \
         externalTrafficPolicy Local knows no short cut for pods.",
        "Make a ProxyProfile with another localDetection, such as the pods' interface or the cluster's CIDR.";
    NOT_LOOKED_AT = "ST0409", "a check could not be made",
        "Nothing is known of what it would have looked at.",
        "If a right is missing, run the check as whoever installs Switchtower: a cluster administrator may read all of it.";
    OTHER_PROXY = "ST0410", "the network plugin serves Services itself",
        "It and Switchtower would translate the same packets, and what the plugin handles before the nf_tables hooks never \
         reaches Switchtower.",
        "Use one of them. To use Switchtower, turn it off in the plugin: Cilium kubeProxyReplacement false, Calico \
         bpfEnabled false, Antrea proxyAll false, kube-router --run-service-proxy=false.";
    KUBEADM_BRINGS_BACK = "ST0411", "kubeadm will bring kube-proxy back",
        "kubeadm upgrade installs the DaemonSet kube-proxy again, on every node.",
        "kubectl -n kube-system edit configmap kubeadm-config, and add `proxy: {disabled: true}` to ClusterConfiguration \
         (kubeadm 1.31 and newer).";
    PORT_TAKEN = "ST0412", "a port that Switchtower needs is taken",
        "The controller listens on 9443, 9444 and 9445, agents on 10249 and 10256, all of them ports of the node.",
        "Move the other program, or choose other ports with the flags of the controller and the agents.";
    SETTINGS_NOT_TAKEN_OVER = "ST0413", "the built-in settings may not be kube-proxy's",
        "Nodes without a ProxyProfile may recognise other pods as local, or serve NodePorts on other addresses, than they \
         did with kube-proxy.",
        "Compare ConfigMap switchtower-builtin-settings with what kube-proxy had, and make a ProxyProfile with what you \
         need; docs/migration.md shows how.";
    FIREWALLS = "ST0414", "kube-proxy opened the hosts' firewalls",
        "With FORWARD policy DROP (Docker sets it) or firewalld, connections that kube-proxy let through may be dropped \
         once its rules are gone.",
        "docs/migration.md, under Firewalls, says which rules to add before kube-proxy goes.";
    KUBE_PROXY_ON_HOST = "ST0415", "kube-proxy may run outside of the API's sight",
        "Both would program Services on the same nodes.",
        "k3s, RKE2: set disable-kube-proxy: true in the servers' configuration. Others: stop the program on each node. \
         docs/migration.md shows how its rules are removed.";
    LOCALHOST_NODE_PORTS = "ST0416", "NodePorts on 127.0.0.1 will end",
        "Host processes that reach a NodePort through localhost are refused.",
        "Let them use the node's address or the ClusterIP.";
    CRD_TERMINATING = "ST0417", "a custom resource is being deleted",
        "Somebody deleted its definition. Objects can no longer be made, and all of them vanish with it.",
        "Let the deletion end, then install again: kubectl apply -k manifests/. If it does not end, objects with a \
         finalizer are left: manifests/README.md, section Uninstalling.";
}

/// The code of this name, however it is written.
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
