//! Module graph of each crate: no cycles, no uses of higher modules, one layout of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::{root, sources};

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

const PACKAGES: [&str; 11] = [
    "proto",
    "telemetry",
    "crds",
    "controller/core",
    "controller/api",
    "controller",
    "standalone",
    "node-agent",
    "node-agent/testing",
    "cli",
    "e2e",
];

#[test]
fn modules_form_no_cycles() {
    let mut cycles = Vec::new();
    for package in PACKAGES {
        cycles.extend(Modules::of(package).cycles().into_iter().map(|cycle| (package, cycle.join(" "))));
    }
    assert!(cycles.is_empty(), "modules that use each other: {cycles:#?}");
}

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
            if is_one_of(&module, lower) {
                let used = uses.iter().filter(|used| is_one_of(used, higher));
                upward.extend(used.map(|used| format!("{package}: {name} uses {}", used.join("::"))));
            }
        }
    }
    assert!(upward.is_empty(), "lower modules that use higher ones: {upward:#?}");
}

#[test]
fn module_files_follow_one_layout() {
    let attribute = ["#", "[", "path"];
    for path in sources() {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        // A file next to the tests would be a test program of its own, so the Cargo book recommends mod.rs there.
        let shared_by_tests = name.ends_with("tests/common/mod.rs");
        assert!(shared_by_tests || !name.ends_with("/mod.rs"), "{name}: use a file with the module's name");
        // Benchmarks use the fixtures of the tests.
        if name.contains("/benches/") {
            continue;
        }
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
