//! The condition LocalDetection: which connections count as those of local pods, and whether known pods are missed.

use switchtower_admin_api::NodeReason;
use switchtower_core::locality::{Detection, Locality};

use super::condition::{Status, Verdict};

/// Returns the verdict of the condition.
pub(super) fn verdict(locality: &Locality) -> Verdict {
    let Locality { detection, missed, .. } = locality;
    let networks = detection.networks().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if *missed > 0 {
        return Verdict::new(Status::False, NodeReason::PodsOutside, sentence(&locality.missed_message()));
    }
    let (status, reason, message) = match detection {
        // Only the node can see which pods are behind an interface.
        Detection::Interface(name) => (
            Status::Unknown,
            NodeReason::ByInterface,
            format!("Connections through the interface {name} count as those of local pods."),
        ),
        Detection::Nothing => (
            Status::True,
            NodeReason::NothingLocal,
            "No connection counts as one of a local pod: connections to ClusterIPs keep their source address."
                .to_owned(),
        ),
        Detection::PodCidrs(_) if networks.is_empty() => (
            Status::True,
            NodeReason::NothingLocal,
            "The Node has no pod CIDR, so no connection counts as one of a local pod: connections to ClusterIPs keep \
             their source address."
                .to_owned(),
        ),
        Detection::PodCidrs(_) => (
            Status::True,
            NodeReason::PodsInside,
            format!("Connections from the Node's pod CIDRs ({networks}) count as those of local pods."),
        ),
        Detection::ClusterCidrs(_) => (
            Status::True,
            NodeReason::PodsInside,
            format!("Connections from the cluster CIDRs ({networks}) count as those of local pods."),
        ),
    };
    Verdict::new(status, reason, message)
}

/// Capitalizes the first letter.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(text: &str) -> Vec<ipnet::IpNet> {
        vec![text.parse().unwrap()]
    }

    #[test]
    fn each_detection_mode_has_its_verdict() {
        let of = |detection, missed| {
            let samples = if missed > 0 { vec!["10.244.3.11".parse().unwrap()] } else { Vec::new() };
            verdict(&Locality { detection, missed, samples })
        };
        let cidr = || networks("10.244.77.0/24");
        for (detection, missed, status, reason, part) in [
            (Detection::Nothing, 0, Status::True, "NothingLocal", "No connection"),
            (Detection::PodCidrs(Vec::new()), 0, Status::True, "NothingLocal", "no pod CIDR"),
            (Detection::PodCidrs(cidr()), 0, Status::True, "PodsInside", "10.244.77.0/24"),
            (Detection::ClusterCidrs(cidr()), 0, Status::True, "PodsInside", "cluster CIDRs"),
            (Detection::Interface("cali*".into()), 0, Status::Unknown, "ByInterface", "cali*"),
            (Detection::PodCidrs(cidr()), 2, Status::False, "PodsOutside", "2 ready endpoints"),
            (Detection::ClusterCidrs(cidr()), 1, Status::False, "PodsOutside", "10.244.3.11"),
        ] {
            let verdict = of(detection, missed);
            let message = &verdict.message;
            assert_eq!((verdict.status, &*verdict.reason), (status, reason), "{message}");
            assert!(message.contains(part) && message.ends_with('.'), "{message}");
        }
    }
}
