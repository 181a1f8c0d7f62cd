//! Rules of the repository that a machine can check: see CONTRIBUTING.md.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

mod modules;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use switchtower_e2e::lab::programs::repository as root;

/// All Rust sources of the workspace except generated ones.
fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "gen" {
                    walk(&path, found);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    assert!(found.len() > 50, "only {} sources found below {}", found.len(), root().display());
    found
}

#[test]
fn modules_start_with_docs() {
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{}: the first line is not a `//!` comment", path.display());
    }
}

#[test]
fn files_have_at_most_600_lines() {
    for path in sources() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 600, "{} has {lines} lines: split it", path.display());
    }
}

/// A module file without a `mod` declaration is never compiled.
#[test]
fn module_files_are_declared() {
    let all = sources();
    let texts: Vec<_> = all.iter().map(|path| (path, fs::read_to_string(path).unwrap())).collect();
    for path in &all {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let folder = path.parent().unwrap();
        let folder_name = folder.file_name().unwrap().to_str().unwrap();
        let is_root = matches!(stem, "lib" | "main" | "build")
            || matches!(folder_name, "bin" | "benches" | "examples" | "fuzz_targets")
            || folder_name == "tests" && folder.parent().unwrap().join("Cargo.toml").exists();
        if is_root {
            continue;
        }
        let (module, parent) = match stem {
            "mod" => (folder_name, folder.parent().unwrap()),
            _ => (stem, folder),
        };
        let declared = texts.iter().any(|(declarer, text)| {
            // The declaring file is beside the module, or it is the file that the folder is named after.
            let near = declarer.parent() == Some(parent) || **declarer == parent.with_extension("rs");
            let names = |line: &str| {
                let line = line.trim().strip_suffix(';').unwrap_or_default();
                line.rsplit_once("mod ").is_some_and(|(_, name)| name == module)
            };
            let by_path = format!("{folder_name}/{stem}.rs\"]");
            let beside = format!("\"{stem}.rs\"]");
            near && text.lines().any(|line| names(line) || line.contains(&beside))
                || text.lines().any(|line| line.contains(&by_path))
        });
        assert!(declared, "{}: no file says `mod {module};`", path.display());
    }
}

/// The crates that a crate links, including itself.
fn links(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["tree", "--locked", "--offline", "-p", package, "-e", "normal", "--prefix", "none"]);
    let output = command.args(["-f", "{p}"]).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
}

fn links_none_of(package: &str, forbidden: &[&str]) {
    let linked = links(package);
    assert!(linked.contains(package));
    for name in forbidden {
        assert!(!linked.contains(*name), "{package} links {name}");
    }
}

#[test]
fn agent_links_neither_kubernetes_client_nor_compiler() {
    let forbidden = ["kube", "kube-client", "k8s-openapi", "switchtower-core", "switchtower-crds"];
    links_none_of("switchtower-node-agent", &forbidden);
}

#[test]
fn compiler_links_no_io() {
    links_none_of("switchtower-core", &["kube", "kube-client", "k8s-openapi", "tonic", "tokio", "hyper"]);
}

#[test]
fn cli_links_no_compiler_and_no_grpc() {
    links_none_of(
        "kubectl-switchtower",
        &["switchtower-core", "switchtower-proto", "switchtower-controller", "tonic"],
    );
}

/// Clippy checks the standard library (`incompatible_msrv`); this checks the dependencies.
#[test]
fn dependencies_support_the_declared_rust_version() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--offline", "--format-version=1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let version = |package: &serde_json::Value| -> Option<Vec<u32>> {
        let numbers = package["rust_version"].as_str()?.split('.').take(2);
        numbers.map(|number| number.parse().ok()).collect()
    };
    let packages = metadata["packages"].as_array().unwrap();
    let own = packages.iter().find(|package| package["name"] == "switchtower-core").unwrap();
    let declared = version(own).unwrap();
    let newer: Vec<_> = packages
        .iter()
        .filter(|package| version(package).is_some_and(|wanted| wanted > declared))
        .map(|package| {
            format!("{} {} needs {}", package["name"], package["version"], package["rust_version"])
        })
        .collect();
    assert!(newer.is_empty(), "they need a newer Rust than {declared:?}: {newer:#?}");
}

#[test]
fn one_tls_provider_is_linked() {
    for package in ["switchtower-controller", "switchtower-node-agent"] {
        links_none_of(package, &["aws-lc-rs", "openssl", "native-tls"]);
    }
}

/// The fault table names existing tests, each after its file.
#[test]
fn reliability_page_names_existing_tests() {
    let page = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let mut rows = 0;
    for line in page.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`")) {
        let names: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        let at = names.iter().position(|name| name.ends_with(".rs")).unwrap();
        for pair in names[at..].chunks(2) {
            assert_eq!(pair.len(), 2, "a file without a test: {line}");
            let (file, test) = (pair[0], pair[1]);
            let text = fs::read_to_string(root().join(file)).unwrap_or_default();
            assert!(text.contains(&format!("fn {test}(")), "{file} has no test {test}");
            rows += 1;
        }
    }
    assert!(rows > 20, "{rows}");
}

/// A renamed or removed test would leave its scenario untested.
#[test]
fn parity_page_names_existing_tests() {
    let page = fs::read_to_string(root().join("docs/parity.md")).unwrap();
    let names: BTreeSet<&str> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| {
            word.contains('_')
                && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        })
        .collect();
    assert!(names.len() > 72, "only {} names of tests in docs/parity.md", names.len());
    let texts: Vec<_> = sources().iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    for name in names {
        let definition = format!("fn {name}(");
        // Attributes or comments may stand between: search the whole item before the function.
        let is_test = |text: &String| {
            text.match_indices(&definition).any(|(at, _)| {
                let before = text[..at].rsplit("\n\n").next().unwrap_or_default();
                before.contains("#[test]") || before.contains("#[tokio::test") || text.contains("proptest!")
            })
        };
        assert!(texts.iter().any(is_test), "docs/parity.md names the test {name}, which does not exist");
    }
    for number in 1..=72 {
        assert!(page.contains(&format!("\n| {number} | ")), "scenario {number} is missing in docs/parity.md");
    }
}

/// Parts of the repository whose comments, documents and messages are checked for phrases.
const PROSE: [&str; 15] = [
    "charts",
    "cli",
    "controller",
    "crds",
    "docs",
    "examples",
    "hack",
    "manifests",
    "node-agent",
    "proto",
    "standalone",
    "telemetry",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
];

/// Phrases with a standard term instead (docs/glossary.md, CONTRIBUTING.md).
const PHRASES: [(&str, &str); 13] = [
    ("anew", "again"),
    ("beside", "next to"),
    ("for people", "human-readable"),
    ("gets on", "makes progress"),
    ("in the end", "finally"),
    ("is told", "is notified"),
    ("meanwhile", "in this time"),
    ("nobody", "no one"),
    ("says so", "reports it"),
    ("somebody", "another program, a user"),
    ("tried again", "retried"),
    ("what holds", "invariants"),
    ("whoever", "users who"),
];

/// Returns the lines of a text file without fenced code, which may quote output.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// Adds the text files at a path, without build results and generated pages.
fn text_files(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap().flatten().filter(|entry| entry.file_name() != "target") {
            text_files(&entry.path(), found);
        }
    } else if path
        .extension()
        .is_some_and(|kind| ["rs", "md", "sh", "yaml", "toml", "proto"].iter().any(|known| kind == *known))
    {
        found.push(path.to_owned());
    }
}

#[test]
fn prose_uses_standard_terms() {
    let mut files = Vec::new();
    for part in PROSE {
        text_files(&root().join(part), &mut files);
    }
    assert!(files.len() > 50, "only {} files", files.len());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in prose(&text) {
            let line =
                line.to_lowercase().replace(|letter: char| !letter.is_alphanumeric() && letter != '_', " ");
            let line = format!(" {line} ");
            for (phrase, instead) in PHRASES {
                let found = line.contains(&format!(" {phrase} "));
                assert!(!found, "{}:{}: write \"{instead}\", not \"{phrase}\"", file.display(), number + 1);
            }
        }
    }
}

/// Returns the names in the dependency tables of a manifest.
fn dependencies(manifest: &str) -> Vec<&str> {
    let mut table = "";
    let mut found = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            table = line;
        } else if table.contains("dependencies") && line.contains('=') && !line.starts_with('#') {
            found.extend(line.split(['.', ' ', '=']).next());
        }
    }
    found
}

#[test]
fn no_dependency_is_unused() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = ")).unwrap();
    let members: Vec<&str> = members.split('"').skip(1).step_by(2).collect();
    assert!(members.len() > 5, "{members:?}");
    for member in members {
        let folder = root().join(member);
        let mut files = Vec::new();
        for part in
            ["src", "tests", "benches"].map(|part| folder.join(part)).iter().filter(|part| part.exists())
        {
            text_files(part, &mut files);
        }
        let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        let words: BTreeSet<&str> =
            text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').collect();
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        for dependency in dependencies(&manifest) {
            let name = dependency.replace('-', "_");
            assert!(words.contains(&*name), "{member}/Cargo.toml: {dependency} is unused: remove it");
        }
    }
}
