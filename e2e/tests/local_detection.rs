//! Pods with addresses outside their Node's pod CIDR, as with Calico's IPAM. The controller adopts kube-proxy's
//! detection mode at installation and keeps it; if it is unknown, the rows report it.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Node};
use kube::Api;
use kube::api::ListParams;
use serde_json::json;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::probe::{ProbeResult, Transport};
use switchtower_e2e::switchtower::{Fleet, NAMESPACE};

use switchtower_e2e::scene::{Scene, cluster_ip, eventually, node, nodes};

const TIMEOUT: Duration = Duration::from_secs(60);
const RECORD: &str = "switchtower-builtin-settings";
const VIPS: [&str; 2] = ["203.0.113.77", "2001:db8:113::77"];

/// Gives gamma pod CIDRs that do not contain its pods.
fn move_cidr(fleet: &Fleet) {
    let gamma = node(fleet, "gamma");
    fleet.kube().delete_cluster::<Node>("gamma").unwrap();
    let mut object = objects::node(&gamma.net, &gamma.zone);
    object["spec"] = json!({"podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24", "fd00:244:77::/64"]});
    wait::until("the Node can be created again", TIMEOUT, || fleet.kube().apply(&object)).unwrap();
}

fn record(fleet: &Fleet, key: &str) -> anyhow::Result<String> {
    let map: Option<ConfigMap> = fleet.kube().get(NAMESPACE, RECORD)?;
    let mut data = map.context("there is no record")?.data.context("it is empty")?;
    data.remove(key).context("it has no such key")
}

/// State, and reason and message of the condition LocalDetection.
#[track_caller]
fn detection(fleet: &Fleet, name: &str, state: &str, reason: &str, part: &str) {
    wait::until(&format!("the row {name} reports {reason}"), TIMEOUT, || {
        let row = fleet.row(name)?;
        let condition = row.conditions.iter().find(|condition| condition.type_ == "LocalDetection");
        let condition = condition.context("no such condition")?;
        ensure!(
            row.state == state && condition.reason == reason && condition.message.contains(part),
            "{row:?}"
        );
        Ok(())
    })
    .with_context(|| fleet.controller_log())
    .unwrap();
}

#[track_caller]
fn restart_controller(fleet: &Fleet) {
    fleet.stop_controller(15).unwrap();
    fleet.start_controller().unwrap();
    fleet.settled(TIMEOUT).unwrap();
}

/// Checks that gamma's pods are seen under their own addresses, and use the short cut of externalTrafficPolicy Local.
fn pods_are_local(scene: &Scene, to: impl Fn(bool) -> SocketAddr) {
    for ipv6 in [false, true] {
        let own = ProbeResult::Reply { backend: "a1".to_owned(), source: scene.pod_address("c1", ipv6) };
        let c1 = scene.pod("c1");
        eventually("a pod keeps its address", c1, Transport::Tcp, to(ipv6), |outcome| *outcome == own);
        let vip = SocketAddr::new(VIPS[usize::from(ipv6)].parse().unwrap(), 80);
        eventually("the short cut", c1, Transport::Tcp, vip, |outcome| *outcome == own);
    }
}

#[test]
fn kube_proxy_settings_are_taken_over_and_kept() {
    let fleet: &'static Fleet = Box::leak(Box::new(Fleet::build(&nodes()).unwrap()));
    move_cidr(fleet);
    fleet.install().unwrap();
    fleet.start_controller().unwrap();
    fleet.nodes().iter().for_each(|node| fleet.start_agent(node).unwrap());
    fleet.settled(TIMEOUT).unwrap();
    assert_eq!(
        record(fleet, "origin").unwrap(),
        "Defaults",
        "nothing is known of kube-proxy, and there are no pods"
    );

    // Unknown at installation: reported as soon as pods reveal it.
    let scene = Scene::of(fleet, "outside");
    let service = scene.load_balancer("web", &json!({"externalTrafficPolicy": "Local"}), &VIPS);
    scene.endpoints("web", &["a1", "c2"]);
    detection(fleet, "gamma", "PodsNotLocal", "PodsOutside", "2 ready endpoints");
    detection(fleet, "alpha", "Synced", "PodsInside", "10.244.");
    wait::until("an Event on the Node", TIMEOUT, || {
        let api: Api<Event> = Api::all(fleet.kube().client());
        let events = fleet.kube().block_on(api.list(&ListParams::default()))?.items;
        let wanted = |event: &Event| {
            event.reason.as_deref() == Some("PodsOutside")
                && event.involved_object.name.as_deref() == Some("gamma")
        };
        ensure!(events.iter().any(wanted), "none of {} Events", events.len());
        Ok(())
    })
    .unwrap();
    scene.endpoints("web", &["a1"]);
    detection(fleet, "gamma", "Synced", "PodsInside", "10.244.77.0/24");

    // Decided again with kubeadm's kube-proxy in place.
    fleet.stop_controller(15).unwrap();
    let config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: \"\"\n\
                  clusterCIDR: 10.244.0.0/16,fd00:244::/32\nconntrack: {maxPerCore: 0, min: null}\n";
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"config.conf": config},
        "metadata": {"name": "kube-proxy", "namespace": "kube-system"}});
    fleet.kube().apply(&map).unwrap();
    fleet.kube().delete::<ConfigMap>(NAMESPACE, RECORD).unwrap();
    fleet.start_controller().unwrap();
    fleet.settled(TIMEOUT).unwrap();
    assert_eq!(record(fleet, "origin").unwrap(), "KubeProxy");
    detection(fleet, "gamma", "Synced", "PodsInside", "10.244.0.0/16");
    let to = |ipv6| cluster_ip(&service, ipv6);
    pods_are_local(&scene, to);

    // Neither the removal of kube-proxy nor a restart changes it; a deleted record is written again.
    fleet.kube().delete::<ConfigMap>("kube-system", "kube-proxy").unwrap();
    fleet.kube().delete::<ConfigMap>(NAMESPACE, RECORD).unwrap();
    wait::until("the record is written again", TIMEOUT, || record(fleet, "origin")).unwrap();
    restart_controller(fleet);
    assert_eq!(record(fleet, "origin").unwrap(), "KubeProxy");
    detection(fleet, "gamma", "Synced", "PodsInside", "10.244.0.0/16");
    pods_are_local(&scene, to);
}
