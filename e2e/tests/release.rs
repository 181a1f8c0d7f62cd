//! The files of a release: images with nothing but a static program, and everything else that `hack/release.sh` writes.
//!
//! `make test` builds them before (`hack/test.sh`): `target/release-dry-run` by `hack/release.sh --dry-run`, and a second
//! time, in `target/images-again`, the images.

#![allow(clippy::unwrap_used, reason = "a test ends where something it needs is missing")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use switchtower_e2e::lab::programs::{repository as root, tool};

/// The registry that `hack/test.sh` passes to `hack/release.sh`.
const REGISTRY: &str = "registry.example/st";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Both images.
const IMAGES: [&str; 2] = ["switchtower-controller", "switchtower-node-agent"];
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Folder with the files of the release.
fn release() -> PathBuf {
    let folder = target().join("release-dry-run");
    assert!(
        folder.join("SHA256SUMS").exists(),
        "{} is missing: run 'hack/release.sh --dry-run --registry {REGISTRY} {0}'",
        folder.display()
    );
    folder
}

/// Runs a command and returns its output; the message of a failure is its standard error.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn skopeo(arguments: &[&str], archive: &Path) -> Value {
    let text = run(Command::new("skopeo").args(arguments).arg(format!("oci-archive:{}", archive.display())));
    serde_json::from_str(&text).unwrap()
}

/// Digest of an image, which covers its configuration and its files.
fn digest(archive: &Path) -> Value {
    skopeo(&["inspect"], archive)["Digest"].clone()
}

/// Files of an image's layers and, extracted to the folder, their contents.
fn files(archive: &Path, folder: &Path) -> BTreeSet<String> {
    let (image, root) = (folder.join("image"), folder.join("root"));
    fs::create_dir_all(&root).unwrap();
    let (from, to) = (format!("oci-archive:{}", archive.display()), format!("dir:{}", image.display()));
    run(Command::new("skopeo").args(["copy", "--quiet", &from, &to]));
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(image.join("manifest.json")).unwrap()).unwrap();
    let mut found = BTreeSet::new();
    for layer in manifest["layers"].as_array().unwrap() {
        let blob = image.join(layer["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap());
        let listed = run(Command::new("tar")
            .args(["--extract", "--verbose", "--directory"])
            .arg(&root)
            .arg("--file")
            .arg(blob));
        found.extend(listed.lines().map(|name| name.trim_start_matches("./").to_owned()));
    }
    found
}

/// Fails if the program needs a loader or shared libraries, or is not executable.
fn assert_static(program: &Path) {
    let headers =
        run(Command::new("readelf").args(["--program-headers", "--dynamic", "--wide"]).arg(program));
    assert!(!headers.contains("INTERP"), "{}: {headers}", program.display());
    assert!(!headers.contains("(NEEDED)"), "{}: {headers}", program.display());
    // Starts in an empty root, as in its image.
    let name = format!("/{}", program.file_name().unwrap().to_str().unwrap());
    let help = run(Command::new("chroot").arg(program.parent().unwrap()).args([&name, "--version"]));
    assert!(help.contains(VERSION), "{help}");
}

#[test]
fn images_hold_one_static_program() {
    let folder = release();
    for (name, user) in [("switchtower-controller", "65532:65532"), ("switchtower-node-agent", "0:0")] {
        let archive = folder.join(format!("images/{name}-{ARCHITECTURE}.tar"));
        let config = skopeo(&["inspect", "--config"], &archive);
        assert_eq!(config["config"]["Entrypoint"], json!([format!("/{name}")]), "{name}");
        assert_eq!(config["config"]["User"], user, "{name}");
        assert_eq!(config["architecture"], ARCHITECTURE, "{name}");
        assert_eq!(config["config"]["Labels"]["org.opencontainers.image.version"], VERSION, "{name}");
        let unpacked = tempfile::tempdir().unwrap();
        assert_eq!(files(&archive, unpacked.path()), BTreeSet::from([name.to_owned()]));
        assert_static(&unpacked.path().join("root").join(name));
    }
}

#[test]
fn images_of_two_builds_are_equal() {
    let again = target().join("images-again");
    assert!(again.exists(), "run 'hack/images.sh --relink --tag v{VERSION} {}'", again.display());
    for name in IMAGES {
        let file = format!("images/{name}-{ARCHITECTURE}.tar");
        assert_eq!(digest(&release().join(&file)), digest(&again.join(&file)), "{name}");
    }
}

#[test]
fn install_yaml_names_images_of_the_version() {
    let folder = release();
    let text = fs::read_to_string(folder.join("install.yaml")).unwrap();
    let images: BTreeSet<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
    let wanted = IMAGES.map(|name| format!("{REGISTRY}/{name}:v{VERSION}"));
    assert_eq!(images, wanted.iter().map(String::as_str).collect());
    assert_eq!(text.matches("\nkind: CustomResourceDefinition\n").count(), 3);
}

#[test]
fn plugin_archive_matches_krew_manifest() {
    let folder = release();
    let text = fs::read_to_string(folder.join("krew-switchtower.yaml")).unwrap();
    let manifest: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(manifest["spec"]["version"], format!("v{VERSION}"));
    let platform = &manifest["spec"]["platforms"][0];
    assert_eq!(platform["selector"]["matchLabels"], json!({"os": "linux", "arch": ARCHITECTURE}));
    let archive = folder.join(format!("kubectl-switchtower-linux-{ARCHITECTURE}.tar.gz"));
    let sum = run(Command::new("sha256sum").arg(&archive));
    assert!(sum.starts_with(platform["sha256"].as_str().unwrap()), "{sum}");
    let unpacked = tempfile::tempdir().unwrap();
    run(Command::new("tar")
        .args(["--extract", "--directory"])
        .arg(unpacked.path())
        .arg("--file")
        .arg(archive));
    assert_static(&unpacked.path().join(platform["bin"].as_str().unwrap()));
}

#[test]
fn charts_render_the_released_images() {
    let folder = release();
    for name in ["switchtower-crds", "switchtower"] {
        let mut helm = Command::new(tool("helm").unwrap());
        helm.args(["template", "st", "--kube-version=v1.36.0"])
            .arg(folder.join(format!("{name}-{VERSION}.tgz")));
        let rendered = run(&mut helm);
        let image = format!("image: {REGISTRY}/switchtower-node-agent:v{VERSION}");
        assert_eq!(rendered.contains(&image), name == "switchtower", "{rendered}");
    }
}

#[test]
fn sboms_list_dependencies() {
    let folder = release();
    // Programs, and the packages that build them.
    let programs = [
        ("switchtower-controller", "switchtower-standalone"),
        ("switchtower-node-agent", "switchtower-node-agent"),
        ("kubectl-switchtower", "kubectl-switchtower"),
    ];
    for (name, package) in programs {
        let text = fs::read_to_string(folder.join(format!("{name}.cdx.json"))).unwrap();
        let sbom: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(sbom["bomFormat"], "CycloneDX");
        assert_eq!(sbom["metadata"]["component"]["name"], package);
        let components = sbom["components"].as_array().unwrap();
        let has = |wanted: &str| components.iter().any(|component| component["name"] == wanted);
        assert!(has("rustls") || has("tokio"), "{name}");
        assert!(!has("proptest"), "{name} lists a dependency of tests");
    }
}

#[test]
fn checksums_cover_all_files() {
    let folder = release();
    run(Command::new("sha256sum").args(["--check", "--quiet", "SHA256SUMS"]).current_dir(&folder));
    let sums = fs::read_to_string(folder.join("SHA256SUMS")).unwrap();
    let files = run(Command::new("find").args([".", "-type", "f", "-printf", "%P\\n"]).current_dir(&folder));
    assert_eq!(sums.lines().count() + 1, files.lines().count(), "{files}");
}

#[test]
fn release_script_keeps_folders_of_others() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.txt"), "").unwrap();
    let output =
        Command::new(root().join("hack/release.sh")).arg("--dry-run").arg(folder.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("neither empty"), "{errors}");
    assert!(folder.path().join("thesis.txt").exists());
}

#[test]
fn release_requires_the_tag_of_the_version() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(root().join("hack/release.sh")).arg(folder.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{errors}");
    assert!(errors.contains("has changes") || errors.contains(&format!("not tagged v{VERSION}")), "{errors}");
}
