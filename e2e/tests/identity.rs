//! Authentication of agents: tokens of the real TokenRequest API, reviewed by the real API server. Every refusal is
//! counted under its reason, and never disturbs the nodes' own agents.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

#[cfg(test)]
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use rcgen::{KeyPair, SigningKey as _};
use serde_json::{Value, json};
use switchtower_e2e::lab::control_plane::ISSUER;
use switchtower_e2e::lab::objects;
use switchtower_e2e::lab::wait;
use switchtower_e2e::switchtower::{AGENT_ACCOUNT, AUDIENCE, Fleet, NAMESPACE};

use switchtower_e2e::scene::{SOON, alone, fleet, node};

const REFUSALS: &str = "switchtower_refusals_total";

fn count(fleet: &Fleet, metric: &str, reason: &str) -> f64 {
    fleet.controller_metric(metric, &format!("reason=\"{reason}\"")).unwrap()
}

/// Checks that a second agent in alpha's namespace with this name and token is refused for `reason`, while alpha's
/// own agent stays connected.
fn refused(name: &str, token: &str, reason: &str) {
    let fleet = fleet();
    let before = count(fleet, REFUSALS, reason);
    let stranger = fleet.stranger(node(fleet, "alpha"), name, token).unwrap();
    wait::until(&format!("a refusal for {reason}"), SOON, || {
        stranger.check_running()?;
        let now = fleet.controller_metric(REFUSALS, &format!("reason=\"{reason}\""))?;
        ensure!(now > before, "the counter stays at {now}; its log: {}", stranger.log_text());
        ensure!(fleet.controller_log().contains(reason), "no log line names {reason}");
        Ok(())
    })
    .unwrap();
    drop(stranger);
    fleet.settled(SOON).unwrap();
}

/// Permissions as `kubectl auth can-i --list` prints them, sorted, without padding and duplicates.
fn permissions(user: &str, namespace: &str) -> String {
    let list = ["auth", "can-i", "--list", "--as", user, "-n", namespace];
    let text = fleet().control_plane().kubectl(&list).unwrap();
    let lines = text.lines().skip(1).filter_map(|line| line.rsplit_once('['));
    let mut lines: Vec<String> = lines
        .map(|(resource, verbs)| {
            let mut verbs: Vec<&str> = verbs.trim_end_matches(']').split_whitespace().collect();
            verbs.sort_unstable();
            let resource: Vec<&str> = resource.split_whitespace().collect();
            format!("{} [{}]", resource.join(" "), verbs.join(" "))
        })
        .collect();
    lines.sort_unstable();
    lines.dedup();
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// `SWITCHTOWER_UPDATE=1` writes the list again.
#[test]
fn permissions_equal_the_committed_list() {
    let kubectl = |arguments: &[&str]| fleet().control_plane().kubectl(arguments).unwrap();
    for role in ["switchtower-viewer", "switchtower-operator"] {
        let (name, role, user) = (format!("test-{role}"), format!("--role={role}"), format!("--user={role}"));
        kubectl(&["-n", NAMESPACE, "create", "rolebinding", &name, &role, &user]);
        kubectl(&["create", "clusterrolebinding", &name, &role.replace("--role", "--clusterrole"), &user]);
    }
    let account = |name: &str| format!("system:serviceaccount:{NAMESPACE}:{name}");
    let users = [
        account("switchtower-controller"),
        account(AGENT_ACCOUNT),
        "switchtower-viewer".to_owned(),
        "switchtower-operator".to_owned(),
    ];
    let mut text = String::new();
    for user in &users {
        for namespace in [NAMESPACE, "default"] {
            text += &format!("# {user} in {namespace}\n{}\n", permissions(user, namespace));
        }
    }
    let path = std::env::current_dir().unwrap().join("tests/permissions.txt");
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == committed, "permissions differ from {}; they are now:\n{text}", path.display());
}

#[test]
fn token_for_another_audience_is_refused() {
    let _alone = alone();
    let pod = fleet().agent_pod("alpha").unwrap();
    let token = fleet().token(AGENT_ACCOUNT, Some(&pod), &["elsewhere"], 3600).unwrap();
    refused("alpha", &token, "wrong_audience");
}

#[test]
fn token_of_another_service_account_is_refused() {
    let _alone = alone();
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "intruder", "namespace": NAMESPACE}});
    fleet().kube().apply(&account).unwrap();
    fleet().kube().apply(&objects::pod(NAMESPACE, "intruder", "alpha", "intruder")).unwrap();
    let pod: Pod = fleet().kube().get(NAMESPACE, "intruder").unwrap().unwrap();
    let token = fleet().token("intruder", Some(&pod), &[AUDIENCE], 3600).unwrap();
    refused("alpha", &token, "foreign_service_account");
}

#[test]
fn token_that_is_not_bound_to_a_pod_is_refused() {
    let _alone = alone();
    let token = fleet().token(AGENT_ACCOUNT, None, &[AUDIENCE], 3600).unwrap();
    refused("alpha", &token, "not_pod_bound");
}

#[test]
fn token_whose_pod_is_gone_is_refused() {
    let _alone = alone();
    fleet().kube().apply(&objects::pod(NAMESPACE, "short-lived", "alpha", AGENT_ACCOUNT)).unwrap();
    let pod: Pod = fleet().kube().get(NAMESPACE, "short-lived").unwrap().unwrap();
    let token = fleet().token(AGENT_ACCOUNT, Some(&pod), &[AUDIENCE], 3600).unwrap();
    fleet().kube().delete::<Pod>(NAMESPACE, "short-lived").unwrap();
    refused("alpha", &token, "pod_gone");
}

#[test]
fn expired_token_is_refused() {
    let _alone = alone();
    let pod = fleet().agent_pod("alpha").unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    // The API issues no token for less than ten minutes; this one, signed with its key, is equivalent.
    let claims = json!({
        "iss": ISSUER, "aud": [AUDIENCE],
        "sub": format!("system:serviceaccount:{NAMESPACE}:{AGENT_ACCOUNT}"),
        "iat": now - 7200, "nbf": now - 7200, "exp": now - 3600,
        "kubernetes.io": {
            "namespace": NAMESPACE,
            "serviceaccount": {"name": AGENT_ACCOUNT, "uid": "0"},
            "pod": {"name": pod.metadata.name, "uid": pod.metadata.uid},
            "node": {"name": "alpha", "uid": "0"},
        },
    });
    refused("alpha", &signed(&claims), "expired");
}

#[test]
fn forged_token_is_refused_without_a_review() {
    let _alone = alone();
    let pod = fleet().agent_pod("alpha").unwrap();
    let genuine = fleet().token(AGENT_ACCOUNT, Some(&pod), &[AUDIENCE], 3600).unwrap();
    let (text, _) = genuine.rsplit_once('.').unwrap();
    let signature = KeyPair::generate().unwrap().sign(text.as_bytes()).unwrap();
    refused("alpha", &format!("{text}.{}", base64url(&fixed(&signature))), "forged");
    assert!(fleet().controller_metric("switchtower_token_keys", "").unwrap() >= 1.0, "the keys were read");
}

#[test]
fn malformed_token_refused() {
    let _alone = alone();
    refused("alpha", "not-a-token", "malformed_token");
}

#[test]
fn agent_claiming_another_node_refused() {
    let _alone = alone();
    let pod = fleet().agent_pod("alpha").unwrap();
    let token = fleet().token(AGENT_ACCOUNT, Some(&pod), &[AUDIENCE], 3600).unwrap();
    refused("beta", &token, "node_name_mismatch");
}

#[test]
fn plaintext_is_refused() {
    let _alone = alone();
    let before = count(fleet(), REFUSALS, "plaintext");
    let address = fleet().controller_address();
    let mut stream =
        node(fleet(), "beta").net.namespace.run(|| TcpStream::connect(address)).unwrap().unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    // The connection closes, with or without a TLS alert, but never with an HTTP/2 frame.
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    assert!(answer.len() < 16, "{answer:?}");
    wait::until("a refusal for plaintext", SOON, || {
        ensure!(fleet().controller_metric(REFUSALS, "reason=\"plaintext\"")? > before);
        Ok(())
    })
    .unwrap();
    fleet().settled(SOON).unwrap();
}

/// As an agent that is a systemd unit has it.
#[test]
fn token_bound_to_a_node_identifies_it() {
    let _alone = alone();
    let fleet = fleet();
    let object: Node = fleet.kube().get_cluster("gamma").unwrap().unwrap();
    let bound = Some(("Node", &object.metadata));
    let token = fleet.bound_token(AGENT_ACCOUNT, bound, &[AUDIENCE], 3600).unwrap();
    refused("alpha", &token, "node_name_mismatch");
    supersedes("gamma", &token);
}

#[test]
fn second_agent_of_a_node_supersedes_the_first() {
    let _alone = alone();
    let pod = fleet().agent_pod("gamma").unwrap();
    supersedes("gamma", &fleet().token(AGENT_ACCOUNT, Some(&pod), &[AUDIENCE], 3600).unwrap());
}

/// Checks that a second agent with this token takes the place of the node's own agent until it ends.
fn supersedes(name: &str, token: &str) {
    let fleet = fleet();
    let own = node(fleet, name);
    let ended = "switchtower_streams_ended_total";
    let before = count(fleet, ended, "superseded");
    let session = fleet.row(name).unwrap().connection.unwrap().session;
    let second = fleet.stranger(own, name, token).unwrap();
    wait::until("the first agent's stream is superseded", SOON, || {
        second.check_running()?;
        ensure!(fleet.controller_metric(ended, "reason=\"superseded\"")? > before);
        Ok(())
    })
    .unwrap();
    // The second agent ends, as after a failed rolling update; the first takes over again.
    drop(second);
    wait::until("the node's own agent serves again", Duration::from_secs(60), || {
        let now = fleet.row(name)?.connection.context("the row has no connection")?.session;
        ensure!(now > session, "the row still has session {now}");
        ensure!(fleet.agent_metric(own, "switchtower_controller_connected", "")? == 1.0, "not connected");
        fleet.agrees(own)
    })
    .unwrap();
}

/// Signs a JSON Web Token with the API server's key.
fn signed(claims: &Value) -> String {
    let pem = std::fs::read_to_string(fleet().control_plane().service_account_key()).unwrap();
    let key = KeyPair::from_pem(&pem).unwrap();
    let header = json!({"alg": "ES256", "typ": "JWT"});
    let text =
        format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
    let signature = key.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", base64url(&fixed(&signature)))
}

/// Converts an ECDSA signature from ASN.1 to the two 32-byte numbers of JSON Web Tokens.
fn fixed(signature: &[u8]) -> Vec<u8> {
    let mut rest = &signature[2..];
    let mut result = Vec::new();
    for _ in 0..2 {
        let length = usize::from(rest[1]);
        let number: Vec<_> = rest[2..2 + length].iter().copied().skip_while(|byte| *byte == 0).collect();
        result.resize(result.len() + 32 - number.len(), 0);
        result.extend(number);
        rest = &rest[2 + length..];
    }
    result
}

fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut group = [0; 4];
        group[1..=chunk.len()].copy_from_slice(chunk);
        let group = u32::from_be_bytes(group);
        for position in 0..=chunk.len() {
            text.push(char::from(ALPHABET[(group >> (18 - 6 * position) & 63) as usize]));
        }
    }
    text
}
