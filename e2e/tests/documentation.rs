//! The commands in the documentation: the shell accepts their syntax, kubectl and the plugin accept their arguments,
//! and the API server accepts the objects.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use switchtower_e2e::lab::programs::repository as root;
use switchtower_e2e::lab::{programs, wait};
use switchtower_e2e::switchtower::{Fleet, NodeSpec};

/// A fenced block of a Markdown file.
struct Block {
    /// File and line of the fence, for messages.
    place: String,
    language: String,
    text: String,
}

fn markdown_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders =
        vec![root().join("docs"), root().join("manifests"), root().join("examples"), root().join("charts")];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                files.push(path);
            }
        }
    }
    files.extend(["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(|name| root().join(name)));
    files.sort();
    files
}

fn blocks_of(file: &Path) -> Vec<Block> {
    let name = file.strip_prefix(root()).unwrap().display().to_string();
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in fs::read_to_string(file).unwrap().lines().enumerate() {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                let (place, language) = (format!("{name}:{}", number + 1), language.to_owned());
                open = Some(Block { place, language, text: String::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

fn blocks() -> Vec<Block> {
    markdown_files().iter().flat_map(|file| blocks_of(file)).collect()
}

/// Commands of a block: the whole block for `sh`, the lines after a prompt for sessions.
fn script(block: &Block) -> Option<String> {
    match block.language.as_str() {
        "sh" => Some(block.text.clone()),
        "text" | "console" => {
            let lines = block.text.lines();
            let typed = lines.filter_map(|line| line.strip_prefix("$ ").or_else(|| line.strip_prefix("# ")));
            Some(typed.map(|line| format!("{line}\n")).collect())
        }
        _ => None,
    }
}

fn failed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn shell_blocks_have_valid_syntax() {
    let scripts: Vec<_> =
        blocks().iter().filter_map(|block| Some((block.place.clone(), script(block)?))).collect();
    assert!(scripts.len() > 20, "only {} blocks found", scripts.len());
    for (place, script) in scripts {
        let output = Command::new("/bin/bash").args(["-n", "-c", &script]).output().unwrap();
        assert!(output.status.success(), "{place}: {}", failed(&output));
    }
}

/// Folder with a `kubectl` that parses its arguments and runs nothing: `--help` is read after all other arguments.
fn parsing_kubectl() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let kubectl = programs::control_plane("kubectl").unwrap();
    let plugin = programs::workspace("kubectl-switchtower").unwrap();
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = switchtower ]; then shift; exec {} \"$@\" --help; fi\nexec {} \"$@\" --help\n",
        plugin.display(),
        kubectl.display()
    );
    let path = folder.path().join("kubectl");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

#[test]
fn kubectl_commands_have_valid_arguments() {
    let folder = parsing_kubectl();
    let parse = |line: &str| {
        Command::new("/bin/bash")
            .args(["-c", line])
            .env("PATH", folder.path())
            .current_dir(root())
            .output()
            .unwrap()
    };
    let mut checked = 0;
    for block in blocks() {
        let Some(script) = script(&block) else { continue };
        let joined = script.replace("\\\n", " ");
        for line in joined.lines().map(str::trim).filter(|line| line.starts_with("kubectl ")) {
            // Only the first command: the others of a pipe would run.
            let command = line.split(" | ").next().and_then(|line| line.split("<<").next()).unwrap();
            let output = parse(command);
            assert!(output.status.success(), "{}: {line}: {}", block.place, failed(&output));
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} commands found");
    // The check can fail, for kubectl and for the plugin.
    for wrong in
        ["kubectl get pods --no-such-flag", "kubectl switchtower stat", "kubectl switchtower wait --for 3"]
    {
        assert!(!parse(wrong).status.success(), "{wrong}");
    }
}

/// Runs a script with the kubeconfig of the laboratory.
fn start(fleet: &Fleet, script: &str) -> Child {
    let kubectl = programs::control_plane("kubectl").unwrap();
    let path = format!("{}:/usr/bin:/bin", kubectl.parent().unwrap().display());
    Command::new("/bin/bash")
        .args(["-euc", script])
        .env("PATH", path)
        .env("KUBECONFIG", fleet.control_plane().kubeconfig())
        .current_dir(root())
        .spawn()
        .unwrap()
}

/// Sets the phase of all Pods of Jobs to Succeeded, as their kubelets would.
fn complete_jobs(fleet: &Fleet) -> Result<()> {
    let client = fleet.kube().client();
    let pods: Api<Pod> = Api::namespaced(client, "kube-system");
    let selector = ListParams::default().labels("batch.kubernetes.io/job-name");
    for pod in fleet.kube().block_on(pods.list(&selector))?.items {
        let name = pod.metadata.name.context("a Pod without a name")?;
        let status = json!({"status": {"phase": "Succeeded"}});
        fleet.kube().block_on(pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)))?;
    }
    Ok(())
}

/// Precedes a block that this file runs.
const MARK: &str =
    "<!-- Tested: e2e/tests/documentation.rs runs the next block against a real API server. -->";

#[test]
fn marked_blocks_run_against_a_real_api_server() {
    let fleet = Fleet::build(&[NodeSpec::new("alpha", "east", &[])]).unwrap();
    let mut count = 0;
    // In the order of an installation.
    for page in ["docs/quickstart.md", "docs/standalone.md"] {
        let text = fs::read_to_string(root().join(page)).unwrap();
        for rest in text.split(MARK).skip(1) {
            let script = rest.trim_start().strip_prefix("```sh\n").and_then(|rest| rest.split("```").next());
            let script = script.unwrap_or_else(|| panic!("{page}: no block follows the mark"));
            let status = start(&fleet, script).wait().unwrap();
            assert!(status.success(), "{page}: {status}: {script}");
            count += 1;
        }
    }
    assert_eq!(count, 3);
    for object in ["daemonset/switchtower-node-agent", "role/switchtower-standalone"] {
        fleet.control_plane().kubectl(&["-n", "switchtower-system", "get", object]).unwrap();
    }
}

const KUBE_PROXY_IMAGE: &str = "registry.example/kube-proxy:v1.36.3";

#[test]
fn migration_commands_create_one_cleanup_job_per_node() {
    let nodes = ["alpha", "beta"];
    let fleet = Fleet::build(&nodes.map(|name| NodeSpec::new(name, "east", &[]))).unwrap();
    fleet.install_crds().unwrap();
    let page = blocks_of(&root().join("docs/migration.md"));
    for block in page.iter().filter(|block| block.language == "yaml" && block.text.contains("kind:")) {
        let path = fleet.lab().directory().join("documented.yaml");
        fs::write(&path, &block.text).unwrap();
        fleet.control_plane().kubectl(&["apply", "--dry-run=server", "-f", &path.to_string_lossy()]).unwrap();
    }
    for node in nodes {
        fleet.control_plane().kubectl(&["label", "node", node, "kubernetes.io/os=linux"]).unwrap();
    }
    let daemon_set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
            "template": {
                "metadata": {"labels": {"k8s-app": "kube-proxy"}},
                "spec": {
                    "nodeSelector": {"none": "none"},
                    "containers": [{"name": "kube-proxy", "image": KUBE_PROXY_IMAGE}],
                },
            },
        },
    });
    let path = fleet.lab().directory().join("kube-proxy.json");
    fs::write(&path, daemon_set.to_string()).unwrap();
    fleet.control_plane().kubectl(&["apply", "-f", &path.to_string_lossy()]).unwrap();

    let block = page.iter().find(|block| block.text.starts_with("IMAGE=")).unwrap();
    let mut running = start(&fleet, &block.text);
    wait::until("the documented commands end", Duration::from_secs(120), || {
        complete_jobs(&fleet)?;
        let status = running.try_wait()?.context("still running")?;
        ensure!(status.success(), "{status}");
        Ok(())
    })
    .unwrap();
    let jobs: Api<Job> = Api::namespaced(fleet.kube().client(), "kube-system");
    let jobs = fleet.kube().block_on(jobs.list(&ListParams::default())).unwrap().items;
    let specs = jobs.into_iter().map(|job| job.spec.unwrap().template.spec.unwrap());
    let mut found: Vec<_> =
        specs.map(|spec| (spec.node_name.unwrap(), spec.containers[0].image.clone().unwrap())).collect();
    found.sort();
    assert_eq!(found, nodes.map(|node| (node.to_owned(), KUBE_PROXY_IMAGE.to_owned())));
}
