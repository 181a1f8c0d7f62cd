//! `kubectl switchtower dashboard`: the page, its data and its buttons, over HTTP as a browser uses them.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use switchtower_e2e::lab::{programs, wait};
use switchtower_e2e::scene::{SOON, Scene, fleet};
use switchtower_e2e::switchtower::plugin;

/// A running dashboard, ended on drop.
struct Dashboard {
    process: Child,
    address: SocketAddr,
    /// Path of the page, with the token.
    path: String,
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Dashboard {
    fn start() -> Self {
        let mut command = Command::new(programs::workspace("kubectl-switchtower").unwrap());
        command.arg("--kubeconfig").arg(fleet().control_plane().kubeconfig());
        command.arg("--controller").arg(fleet().admin_address().to_string()).arg("dashboard");
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let (address, path) = line.trim().strip_prefix("http://").unwrap().split_once('/').unwrap();
        Self { process, address: address.parse().unwrap(), path: format!("/{path}") }
    }

    /// Sends a request with the Host of the server and returns status, headers and body.
    fn ask(&self, method: &str, path: &str, headers: &str) -> Result<(u16, String, String)> {
        self.ask_as(&self.address.to_string(), method, path, headers)
    }

    fn ask_as(&self, host: &str, method: &str, path: &str, headers: &str) -> Result<(u16, String, String)> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no end of the headers")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, head.to_lowercase(), body.to_owned()))
    }

    fn json(&self, path: &str) -> Result<Value> {
        let (status, _, body) = self.ask("GET", &format!("{}{path}", self.path), "")?;
        ensure!(status == 200, "{path}: {status} {body}");
        Ok(serde_json::from_str(&body)?)
    }

    /// Presses a button of a rollout, with the headers that the page sends.
    fn press(&self, rollout: &str, action: &str) -> (u16, Value) {
        let headers =
            format!("Origin: http://{}\r\nX-Switchtower-Action: 1\r\nContent-Length: 0\r\n", self.address);
        let path = format!("{}rollouts/{rollout}/{action}", self.path);
        let (status, _, body) = self.ask("POST", &path, &headers).unwrap();
        (status, serde_json::from_str(&body).unwrap())
    }
}

/// Rollout of a profile that waits for an approval of its first step.
fn waiting_rollout(dashboard: &Dashboard) -> Value {
    let profile = json!({
        "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyProfile", "metadata": {"name": "page"},
        "spec": {
            "settings": {"minimumIntervalMilliseconds": 7},
            "strategy": {"steps": [{"name": "canary", "nodes": 1, "approval": "Manual"}, {"nodes": "100%"}],
                "gates": {"probes": []}},
        },
    });
    fleet().kube().apply(&profile).unwrap();
    let mut found = Value::Null;
    wait::until("the page shows a rollout that waits for approval", Duration::from_secs(60), || {
        let state = dashboard.json("state?since=0")?;
        let rollouts = state["rollouts"].as_array().context("no rollouts")?;
        let waiting = rollouts.iter().find(|rollout| rollout["status"]["waitingOn"] == "Approval");
        found = waiting.with_context(|| format!("{rollouts:?}"))?.clone();
        Ok(())
    })
    .unwrap();
    found
}

fn spec_of(rollout: &str) -> Value {
    let kubectl = ["get", "proxyrollout", rollout, "--output=json"];
    let object: Value = serde_json::from_str(&fleet().control_plane().kubectl(&kubectl).unwrap()).unwrap();
    object["spec"].clone()
}

#[test]
fn page_shows_fleet_and_controls_rollouts() {
    let scene = Scene::new("paged");
    scene.service("web", &json!({}));
    scene.endpoints("web", &["a1", "b1"]);
    scene.fleet.settled(SOON).unwrap();
    let dashboard = Dashboard::start();

    let (status, headers, page) = dashboard.ask("GET", &dashboard.path, "").unwrap();
    assert_eq!(status, 200);
    for header in
        ["content-security-policy: default-src 'none'", "x-frame-options: deny", "cache-control: no-store"]
    {
        assert!(headers.contains(header), "{headers}");
    }
    assert!(page.contains("<h1>Switchtower</h1>") && page.contains("id=\"state\">null</script>"));

    let mut version = 0;
    wait::until("all nodes are on the page", SOON, || {
        let state = dashboard.json("state?since=0")?;
        let nodes: Vec<_> =
            state["nodes"].as_array().unwrap().iter().map(|node| (&node["name"], &node["state"])).collect();
        let wanted = ["alpha", "beta", "gamma"].map(|name| (json!(name), json!("Synced")));
        ensure!(nodes == wanted.iter().map(|(name, state)| (name, state)).collect::<Vec<_>>(), "{nodes:?}");
        version = state["version"].as_u64().context("no version")?;
        Ok(())
    })
    .unwrap();

    let path = dashboard.json("service?name=paged%2Fweb&node=alpha").unwrap();
    assert_eq!(path["explanation"]["groups"][0]["findings"][0]["outcome"], "forwarded", "{path:#}");
    assert!(!path["changes"].as_array().unwrap().is_empty(), "{path:#}");
    let missing = dashboard.ask("GET", &format!("{}service?name=paged/none", dashboard.path), "").unwrap();
    assert!(missing.0 == 422 && missing.2.contains("ST0207"), "{missing:?}");

    // A request for changes returns as soon as there is one.
    let rollout = waiting_rollout(&dashboard);
    let update = dashboard.json(&format!("state?since={version}")).unwrap();
    assert_eq!(update["complete"], false, "{update:#}");
    let name = rollout["metadata"]["name"].as_str().unwrap();
    assert_eq!(dashboard.press(name, "pause").0, 200);
    assert_eq!(spec_of(name)["paused"], true);
    assert_eq!(dashboard.press(name, "resume").0, 200);
    assert_eq!(spec_of(name)["paused"], false);
    wait::until("the rollout waits for approval again", SOON, || {
        let (status, answer) = dashboard.press(name, "approve");
        ensure!(status == 200, "{answer}");
        Ok(())
    })
    .unwrap();
    assert_eq!(spec_of(name)["approvedStep"], 1);

    wait::until("the rollout ends", Duration::from_secs(60), || {
        let state = dashboard.json("state?since=0")?;
        let rollouts = state["rollouts"].as_array().context("no rollouts")?;
        let done = rollouts.iter().any(|rollout| rollout["status"]["state"] == "Complete");
        ensure!(done, "{rollouts:?}");
        Ok(())
    })
    .unwrap();
    let (status, answer) = dashboard.press(name, "abort");
    assert_eq!(status, 422);
    assert!(answer["error"].as_str().unwrap().contains("has ended"), "{answer}");
    fleet().control_plane().kubectl(&["delete", "proxyprofile", "page", "--wait=false"]).unwrap();
}

#[test]
fn other_sites_and_programs_are_refused() {
    let dashboard = Dashboard::start();
    assert!(dashboard.address.ip().is_loopback());
    for path in ["/", "/state?since=0", "/0123456789abcdef0123456789abcdef/state?since=0"] {
        let (status, _, body) = dashboard.ask("GET", path, "").unwrap();
        assert_eq!(status, 404, "{path}: {body}");
    }
    // A website whose name was rebound to 127.0.0.1.
    let port = dashboard.address.port();
    let rebound = dashboard.ask_as(&format!("evil.example:{port}"), "GET", &dashboard.path, "").unwrap();
    assert_eq!(rebound.0, 403, "{rebound:?}");
    let path = format!("{}rollouts/any/abort", dashboard.path);
    for headers in ["", "Origin: http://evil.example\r\nX-Switchtower-Action: 1\r\n"] {
        let (status, headers, body) =
            dashboard.ask("POST", &path, &format!("{headers}Content-Length: 0\r\n")).unwrap();
        assert_eq!(status, 403, "{body}");
        assert!(!headers.contains("access-control-allow"), "{headers}");
    }
}

#[test]
fn report_file_contains_the_fleet() {
    fleet().settled(SOON).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.html");
    let answer = plugin::run(fleet(), &["dashboard", "--file", file.to_str().unwrap()]).unwrap();
    assert_eq!(answer.code, 0, "{answer:?}");
    let html = std::fs::read_to_string(&file).unwrap();
    let (_, rest) = html.split_once("id=\"state\">").unwrap();
    let state: Value = serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap();
    assert_eq!((state["complete"].as_bool(), state["nodes"].as_array().unwrap().len()), (Some(true), 3));
}
