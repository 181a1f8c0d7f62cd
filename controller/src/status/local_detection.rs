//! The condition that says which connections count as those of the node's own pods, and whether that is true of the
//! pods that are known.

use switchtower_core::locality::{Detection, Locality};

/// Status, reason and message.
pub(super) fn verdict(locality: &Locality) -> (&'static str, &'static str, String) {
    let Locality { detection, missed, .. } = locality;
    let networks = detection.networks().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if *missed > 0 {
        return ("False", "PodsOutside", sentence(&locality.missed_message()));
    }
    let (status, reason, message) = match detection {
        Detection::Nothing => {
            let message = "No connection counts as one of a local pod: connections to ClusterIPs keep their source address.";
            ("True", "NothingLocal", message.to_owned())
        }
        // Which pods are behind an interface only the node can see.
        Detection::Interface(name) => {
            ("Unknown", "ByInterface", format!("Connections that come in through {name} are those of local pods."))
        }
        Detection::PodCidrs(_) if networks.is_empty() => (
            "True",
            "NothingLocal",
            "The Node has no pod CIDR, so no connection counts as one of a local pod: connections to ClusterIPs keep \
             their source address."
                .to_owned(),
        ),
        Detection::PodCidrs(_) => (
            "True",
            "PodsInside",
            format!("Connections from the Node's pod CIDRs ({networks}) are those of local pods."),
        ),
        Detection::ClusterCidrs(_) => (
            "True",
            "PodsInside",
            format!("Connections from the cluster CIDRs ({networks}) are those of local pods."),
        ),
    };
    (status, reason, message)
}

/// With a capital letter.
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
    fn each_way_of_detection_is_told() {
        let of = |detection, missed| {
            let samples = if missed > 0 { vec!["10.244.3.11".parse().unwrap()] } else { Vec::new() };
            verdict(&Locality { detection, missed, samples })
        };
        let cidr = || networks("10.244.77.0/24");
        for (detection, missed, status, reason, part) in [
            (Detection::Nothing, 0, "True", "NothingLocal", "No connection"),
            (Detection::PodCidrs(Vec::new()), 0, "True", "NothingLocal", "no pod CIDR"),
            (Detection::PodCidrs(cidr()), 0, "True", "PodsInside", "10.244.77.0/24"),
            (Detection::ClusterCidrs(cidr()), 0, "True", "PodsInside", "cluster CIDRs"),
            (Detection::Interface("cali*".into()), 0, "Unknown", "ByInterface", "cali*"),
            (Detection::PodCidrs(cidr()), 2, "False", "PodsOutside", "2 ready endpoints"),
            (Detection::ClusterCidrs(cidr()), 1, "False", "PodsOutside", "10.244.3.11"),
        ] {
            let (is, why, message) = of(detection, missed);
            assert_eq!((is, why), (status, reason), "{message}");
            assert!(message.contains(part) && message.ends_with('.'), "{message}");
        }
    }
}
