//! Rules of the repository that a machine can check: see CONTRIBUTING.md.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    // Cargo runs tests in the package's folder.
    std::env::current_dir().unwrap().parent().unwrap().to_owned()
}

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
            || folder_name == "bin"
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

/// The `use` graph of a crate's module files, read from its sources.
///
/// Test modules are left out, and so are the uses of a module's own ancestors: a child module is a part of its parent,
/// split into a file of its own.
struct Modules {
    /// Module path of each file (`["lab", "http"]`) to the module paths that the file names.
    uses: BTreeMap<Vec<String>, BTreeSet<Vec<String>>>,
}

impl Modules {
    fn of(package: &str) -> Self {
        let source = root().join(package).join("src");
        let mut files = BTreeMap::new();
        for path in sources().into_iter().filter(|path| path.starts_with(&source)) {
            let relative = path.strip_prefix(&source).unwrap().with_extension("");
            let mut module: Vec<String> =
                relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
            match module.first().map(String::as_str) {
                Some("main" | "bin") => continue,
                Some("lib") => module.clear(),
                _ => {}
            }
            files.insert(module, tokens(&fs::read_to_string(&path).unwrap()));
        }
        let mut tests = BTreeSet::new();
        for (module, tokens) in &mut files {
            for name in remove_tests(tokens) {
                tests.insert([module.as_slice(), &[name]].concat());
            }
        }
        files.retain(|module, _| !tests.iter().any(|test| module.starts_with(test)));
        assert!(!files.is_empty(), "no module of {package} found");
        Self::resolve(&files)
    }

    fn resolve(files: &BTreeMap<Vec<String>, Vec<String>>) -> Self {
        let named: BTreeMap<_, _> =
            files.iter().map(|(module, tokens)| (module, paths(module, tokens, files))).collect();
        // A name that a module re-exports belongs to the module that defines it.
        let mut exports = BTreeMap::new();
        for (module, named) in &named {
            for path in named.iter().filter(|path| path.exported) {
                let name = path.segments.last().cloned().unwrap_or_default();
                exports.insert([module.as_slice(), &[name]].concat(), path.segments.clone());
            }
        }
        let owner = |path: &[String]| {
            let mut path = path.to_vec();
            for _ in 0..4 {
                let export = (1..=path.len()).find_map(|length| exports.get(&path[..length]));
                match export {
                    Some(target) if *target != path => path.clone_from(target),
                    _ => break,
                }
            }
            let length = (0..=path.len()).rev().find(|length| files.contains_key(&path[..*length]));
            path[..length.unwrap_or(0)].to_vec()
        };
        let uses = |(module, named): (&&Vec<String>, &Vec<Named>)| {
            let targets = named.iter().map(|path| owner(&path.segments));
            ((*module).clone(), targets.filter(|target| !module.starts_with(target)).collect())
        };
        Self { uses: named.iter().map(uses).collect() }
    }

    /// All modules that a module reaches through the modules that it names.
    fn reach(&self, module: &[String]) -> BTreeSet<&Vec<String>> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<_> = self.uses.get(module).into_iter().flatten().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module) {
                next.extend(self.uses.get(module).into_iter().flatten());
            }
        }
        reached
    }

    /// Modules that reach themselves, in groups that reach each other.
    fn cycles(&self) -> BTreeSet<Vec<String>> {
        let reach: BTreeMap<_, _> = self.uses.keys().map(|module| (module, self.reach(module))).collect();
        let in_cycle = reach.keys().filter(|module| reach[**module].contains(**module));
        let group = |module: &&&Vec<String>| {
            let members = reach[**module].iter().filter(|other| reach[**other].contains(**module));
            members.map(|member| format!("crate::{}", member.join("::"))).collect()
        };
        in_cycle.map(|module| group(&module)).collect()
    }
}

/// A path in a source file, from the crate's root.
struct Named {
    segments: Vec<String>,
    /// The path is part of a `pub use`.
    exported: bool,
}

/// Identifiers, `::` and single other characters, without comments and literals.
fn tokens(text: &str) -> Vec<String> {
    let bytes = text.as_bytes();
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let find = |from: usize, end: &str| text[from..].find(end).map_or(text.len(), |at| from + at + end.len());
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let rest = &bytes[at..];
        at = match rest {
            [b'/', b'/', ..] => find(at, "\n"),
            [b'/', b'*', ..] => find(at, "*/"),
            [b'r', b'"', ..] => find(at + 2, "\""),
            [b'r', b'#', b'"', ..] => find(at + 3, "\"#"),
            [b'"', ..] => {
                let mut end = at + 1;
                while end < bytes.len() && bytes[end] != b'"' {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                end + 1
            }
            [b'\'', b'\\', ..] => find(at + 3, "'"),
            [b'\'', _, b'\'', ..] => at + 3,
            [b':', b':', ..] => {
                found.push("::".to_owned());
                at + 2
            }
            [first, ..] if word(*first) => {
                let length = rest.iter().take_while(|byte| word(**byte)).count();
                found.push(text[at..at + length].to_owned());
                at + length
            }
            [first, ..] => {
                if first.is_ascii() && !first.is_ascii_whitespace() {
                    found.push(char::from(*first).to_string());
                }
                at + 1
            }
            [] => break,
        };
    }
    found
}

/// Removes the items with `#[cfg(test)]`; returns the names of test modules in files of their own.
fn remove_tests(tokens: &mut Vec<String>) -> Vec<String> {
    const TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut files = Vec::new();
    let mut from = 0;
    while let Some(start) = tokens[from..].windows(TEST.len()).position(|window| window == TEST) {
        let start = from + start;
        let (mut end, mut depth) = (start + TEST.len(), 0);
        while end < tokens.len() {
            match tokens[end].as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            end += 1;
            let closed = tokens[end - 1] == ";" || tokens[end - 1] == "}";
            if depth == 0 && closed {
                break;
            }
        }
        if let [.., keyword, name, end] = &tokens[start..end]
            && keyword == "mod"
            && end == ";"
        {
            files.push(name.clone());
        }
        tokens.drain(start..end);
        from = start;
    }
    files
}

/// The paths of a file that begin with `crate`, `super`, `self` or one of the module's own children.
fn paths(module: &[String], tokens: &[String], files: &BTreeMap<Vec<String>, Vec<String>>) -> Vec<Named> {
    let mut found = Vec::new();
    let mut exported = false;
    for at in 0..tokens.len() {
        let before = at.checked_sub(1).map_or("", |before| tokens[before].as_str());
        match tokens[at].as_str() {
            "use" => exported = before == "pub" || before == ")",
            ";" => exported = false,
            _ => {}
        }
        let child = || files.contains_key(&[module, &tokens[at..=at]].concat());
        let begins = tokens.get(at + 1).is_some_and(|next| next == "::")
            && before != "::"
            && (["crate", "super", "self"].contains(&tokens[at].as_str()) || child());
        if begins {
            let mut segments = Vec::new();
            tree(tokens, at, module.to_vec(), &mut segments);
            found.extend(segments.into_iter().map(|segments| Named { segments, exported }));
        }
    }
    found
}

/// Expands the path or `use` tree at a token; returns the position of the token after it.
fn tree(tokens: &[String], mut at: usize, mut base: Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = if tokens[at] == "," { at + 1 } else { tree(tokens, at, base.clone(), found) };
                }
                return at + 1;
            }
            Some("crate") => base.clear(),
            Some("super") => drop(base.pop()),
            Some("self") => {}
            Some(name) if name.starts_with(|first: char| first.is_alphabetic() || first == '_') => {
                base.push(name.to_owned());
            }
            _ => {
                found.push(base);
                return at + 1;
            }
        }
        at += 1;
        match tokens.get(at).map(String::as_str) {
            Some("::") => at += 1,
            Some("as") => {
                found.push(base);
                return at + 2;
            }
            _ => {
                found.push(base);
                return at;
            }
        }
    }
}

const PACKAGES: [&str; 9] = [
    "proto",
    "telemetry",
    "crds",
    "controller/core",
    "controller/api",
    "controller",
    "node-agent",
    "cli",
    "e2e",
];

/// Modules that are still part of a cycle, by package: remove entries, never add any.
const KNOWN_CYCLES: [(&str, &str); 5] = [
    ("controller/core", "crate::compile::service"),
    ("controller/core", "crate::rollout::decide"),
    ("controller/core", "crate::rollout::profile"),
    ("controller", "crate::serve::session"),
    ("node-agent", "crate::state::update"),
];

#[test]
fn modules_form_no_cycles() {
    let mut cycles = Vec::new();
    for package in PACKAGES {
        let known = |cycle: &Vec<String>| {
            cycle.iter().any(|module| KNOWN_CYCLES.contains(&(package, module.as_str())))
        };
        let found = Modules::of(package).cycles().into_iter().filter(|cycle| !known(cycle));
        cycles.extend(found.map(|cycle| (package, cycle.join(" "))));
    }
    assert!(cycles.is_empty(), "modules that use each other: {cycles:#?}");
}

/// Modules that still use a higher one, by package: remove entries, never add any.
const KNOWN_UPWARD: [(&str, &str); 4] = [
    ("node-agent", "health::node_ports"),
    ("node-agent", "kernel::addresses"),
    ("node-agent", "kernel::conntrack"),
    ("node-agent", "kernel::nft::foreign"),
];

#[test]
fn lower_modules_do_not_use_higher_ones() {
    // Package, modules, and modules that they must not use.
    let rules = [
        ("node-agent", &["kernel", "state", "health"][..], &["engine", "run"][..]),
        ("e2e", &["lab", "observe", "probe"], &["switchtower", "scene", "parity", "bench", "demo"]),
    ];
    let is_one_of = |module: &[String], names: &[&str]| {
        module.first().is_some_and(|first| names.contains(&first.as_str()))
    };
    let mut upward = Vec::new();
    for (package, lower, higher) in rules {
        for (module, uses) in Modules::of(package).uses {
            let name = module.join("::");
            if is_one_of(&module, lower) && !KNOWN_UPWARD.contains(&(package, name.as_str())) {
                let used = uses.iter().filter(|used| is_one_of(used, higher));
                upward.extend(used.map(|used| format!("{package}: {name} uses {}", used.join("::"))));
            }
        }
    }
    assert!(upward.is_empty(), "lower modules that use higher ones: {upward:#?}");
}

/// Files that still have another layout: remove entries, never add any.
const KNOWN_LAYOUTS: [&str; 2] = ["node-agent/tests/", "node-agent/src/"];

#[test]
fn module_files_follow_one_layout() {
    let attribute = ["#", "[", "path"];
    for path in sources() {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        if KNOWN_LAYOUTS.iter().any(|known| name.starts_with(known)) {
            continue;
        }
        assert!(!name.ends_with("/mod.rs"), "{name}: use a file with the module's name");
        let tokens = tokens(&fs::read_to_string(&path).unwrap());
        assert!(
            !tokens.windows(3).any(|window| window == attribute),
            "{name}: #[path] hides where a module is"
        );
    }
}

#[test]
fn module_graph_resolves_use_trees_and_reexports() {
    let file = |path: &str, text: &str| {
        let module: Vec<String> =
            path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        (module, tokens(text))
    };
    let graph = |files: &[(&str, &str)]| {
        Modules::resolve(&files.iter().map(|(path, text)| file(path, text)).collect()).cycles()
    };
    let reexport = ("lab", "mod network; pub mod http; pub use network::{Lab, Node as Other};");
    let network =
        ("lab::network", "pub struct Lab; // crate::lab::http\nconst TEXT: &str = \"super::http\";");
    assert!(graph(&[reexport, network, ("lab::http", "use super::Lab;")]).is_empty());
    let cyclic =
        graph(&[("a", "use crate::{b::{self, B}, c};"), ("b", "fn f() { super::a::g::<u8>() }"), ("c", "")]);
    assert_eq!(cyclic, [vec!["crate::a".to_owned(), "crate::b".to_owned()]].into());
    assert!(graph(&[("a", "mod b; fn f() { b::g() }"), ("a::b", "use super::A;")]).is_empty());
}

#[test]
fn test_items_are_not_part_of_the_graph() {
    let mut text = tokens("#[cfg(test)] mod tests; #[cfg(test)] mod more { use crate::a; } use crate::b;");
    assert_eq!(remove_tests(&mut text), ["tests"]);
    assert_eq!(text.join(" "), "use crate :: b ;");
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
fn the_cli_links_no_compiler_and_no_grpc() {
    links_none_of(
        "kubectl-switchtower",
        &["switchtower-core", "switchtower-proto", "switchtower-controller", "tonic"],
    );
}

#[test]
fn one_tls_provider_is_linked() {
    for package in ["switchtower-controller", "switchtower-node-agent"] {
        links_none_of(package, &["aws-lc-rs", "openssl", "native-tls"]);
    }
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

/// Names of the workspace's programs, by package.
fn programs() -> BTreeSet<(String, String)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--locked", "--offline", "--no-deps", "--format-version=1"]);
    let output = command.current_dir(root()).output().unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let targets = packages.iter().flat_map(|package| {
        package["targets"].as_array().unwrap().iter().map(move |target| (&package["name"], target))
    });
    let programs = targets.filter(|(_, target)| target["kind"][0] == "bin");
    programs.map(|(package, target)| (text(package), text(&target["name"]))).collect()
}

/// The Dockerfile and `make cluster` build the same images.
#[test]
fn dockerfile_builds_images_of_the_cluster() {
    let dockerfile = fs::read_to_string(root().join("manifests/Dockerfile")).unwrap();
    let programs = programs();
    for image in switchtower_e2e::cluster::images::switchtower_images(Path::new("")) {
        let name = image.name;
        assert!(programs.contains(&(name.to_owned(), name.to_owned())), "no program {name}");
        let stage = name.strip_prefix("switchtower-").unwrap();
        let (_, rest) = dockerfile.split_once(&format!(" AS {stage}\n")).unwrap();
        let lines: Vec<_> = rest.lines().take_while(|line| !line.starts_with("FROM ")).collect();
        let mut wanted = vec![
            format!("COPY --from=build /src/target/release/{name} /{name}"),
            format!("ENTRYPOINT [\"{}\"]", image.entrypoint[0]),
        ];
        if !image.user.is_empty() {
            wanted.push(format!("USER {}", image.user));
        }
        for line in wanted {
            assert!(lines.contains(&line.as_str()), "{stage}: no line {line:?} in {lines:?}");
        }
        assert!(dockerfile.contains(&format!("-p {name} --bin {name}")), "{name} is not built");
        let tag = &image.tags[0];
        assert!(
            dockerfile.contains(&format!("--target {stage} -t {tag} .")),
            "{tag} is not the name in the comment"
        );
    }
}

/// Parts of the repository whose comments, documents and messages are checked for phrases.
const PROSE: [&str; 9] =
    ["cli", "crds", "docs", "examples", "hack", "manifests", "README.md", "CONTRIBUTING.md", "SECURITY.md"];

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
    } else if path.extension().is_some_and(|kind| ["rs", "md", "sh", "yaml", "toml"].iter().any(|known| kind == *known))
        // Generated from the message codes.
        && !path.ends_with("docs/codes.md")
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
