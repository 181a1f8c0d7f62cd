//! Builds the cluster's own images without a container engine: a tar of one layer, a config and a manifest, in the format
//! of `docker save` and `ctr image import`. The images of Switchtower are those of `hack/images.sh`.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::layout::{Layout, Tools};
use super::machine::Machine;
use super::shell::{finish, on_each, run};

/// Sandbox image of every pod.
pub const PAUSE: &str = "switchtower.dev/cluster/pause:1";
/// The same image under the name that upstream's suite in v1.36 uses.
const UPSTREAM_PAUSE: &str = "registry.k8s.io/pause:3.10.2";
/// Server that answers with packets of an invalid connection state, for a conntrack test of the suite.
const UPSTREAM_INVALID_STATE: &str = "registry.k8s.io/e2e-test-images/regression-issue-74839:1.4";
pub const COREDNS: &str = "switchtower.dev/cluster/coredns:1";
/// Images that the manifests install, and their names there.
const SWITCHTOWER: [(&str, &str); 2] = [
    ("switchtower-controller", "switchtower.dev/switchtower-controller:dev"),
    ("switchtower-node-agent", "switchtower.dev/switchtower-node-agent:dev"),
];
/// The test image: first the name that the demo uses, then those of upstream's suite in v1.36.
const TEST_IMAGE_TAGS: [&str; 6] = [
    "switchtower.dev/cluster/agnhost:1",
    "registry.k8s.io/e2e-test-images/agnhost:2.63.0",
    "registry.k8s.io/e2e-test-images/agnhost:2.55",
    "registry.k8s.io/e2e-test-images/busybox:1.37.0-1",
    "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0",
    // The suite uses the program `conntrack` of this image.
    "registry.k8s.io/build-image/distroless-iptables:v0.9.6",
];

/// Name prefix of temporary build folders.
const UNFINISHED: &str = ".unfinished-";

/// Version of the archive layout; increment it when archives are built differently.
const FORMAT: u8 = 2;
/// Minimum age for deletion: another run may still be importing a younger archive.
const YOUNG: Duration = Duration::from_secs(600);

/// Contents of an image.
#[derive(Debug, Clone)]
pub struct Image {
    /// File name of the archive, without extension.
    pub name: &'static str,
    /// Names of the image after import.
    pub tags: Vec<String>,
    pub layer: Layer,
    pub entrypoint: Vec<String>,
    /// Default arguments of the container.
    pub arguments: Vec<String>,
    /// Numeric user, empty for root.
    pub user: &'static str,
}

/// Source of the layer's files.
#[derive(Debug, Clone)]
pub enum Layer {
    /// An existing tar.
    Tar(PathBuf),
    /// A static program.
    Program(PathBuf),
}

/// Images that a cluster has before anything is installed on it.
pub fn base_images(tools: &Tools) -> Vec<Image> {
    let test_tags = TEST_IMAGE_TAGS.iter().map(|&tag| tag.to_owned()).collect();
    let mut pause = program("pause", PAUSE, &tools.cluster("pause"), "65535:65535");
    pause.tags.push(UPSTREAM_PAUSE.to_owned());
    let invalid_state = tools.cluster("regression-issue-74839");
    vec![
        pause,
        program("regression-issue-74839", UPSTREAM_INVALID_STATE, &invalid_state, ""),
        program("coredns", COREDNS, &tools.cluster("coredns"), ""),
        Image {
            name: "agnhost",
            tags: test_tags,
            layer: Layer::Tar(tools.cluster("agnhost-root.tar")),
            entrypoint: vec!["/agnhost".into()],
            arguments: vec!["pause".into()],
            user: "",
        },
    ]
}

fn program(name: &'static str, tag: &str, path: &Path, user: &'static str) -> Image {
    Image {
        name,
        tags: vec![tag.to_owned()],
        layer: Layer::Program(path.to_owned()),
        entrypoint: vec![format!("/{name}")],
        arguments: Vec::new(),
        user,
    }
}

/// Writes the archive into the folder and returns its path.
///
/// An archive built from the same files is reused: its name contains their fingerprint.
pub fn assemble(image: &Image, folder: &Path) -> Result<PathBuf> {
    let archive = folder.join(format!("{}-{}.tar", image.name, fingerprint(image)?));
    if archive.exists() {
        return Ok(archive);
    }
    let work = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(folder)
        .context("creating a temporary folder")?;
    let layer = match &image.layer {
        Layer::Tar(path) => path.clone(),
        Layer::Program(path) => program_layer(image.name, path, work.path())?,
    };
    let digest = sha256(&layer)?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": image.entrypoint,
            "Cmd": image.arguments,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "User": image.user,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [{"created_by": "switchtower"}],
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": image.tags, "Layers": ["layer.tar"]}]);
    let contents = work.path().join("archive");
    fs::create_dir(&contents).context("making the archive's folder")?;
    fs::write(contents.join("config.json"), config.to_string()).context("writing the image's config")?;
    fs::write(contents.join("manifest.json"), manifest.to_string())
        .context("writing the image's manifest")?;
    if fs::hard_link(&layer, contents.join("layer.tar")).is_err() {
        fs::copy(&layer, contents.join("layer.tar")).context("copying the layer")?;
    }
    let unfinished = work.path().join("image.tar");
    tar(&contents, &unfinished, &["manifest.json", "config.json", "layer.tar"])?;
    fs::rename(&unfinished, &archive).with_context(|| format!("placing {}", archive.display()))?;
    remove_older(image.name, &archive, folder)?;
    Ok(archive)
}

/// Fingerprint of an archive's inputs. Size and modification time stand for a file's content: reading 300 MB at every
/// start takes seconds.
fn fingerprint(image: &Image) -> Result<String> {
    let input = match &image.layer {
        Layer::Tar(path) | Layer::Program(path) => path,
    };
    let known = fs::metadata(input).with_context(|| format!("reading {}", input.display()))?;
    let text = format!(
        "{FORMAT} {} {image:?}\n{} {} {}.{}",
        architecture(),
        input.display(),
        known.len(),
        known.mtime(),
        known.mtime_nsec()
    );
    Ok(format!("{:x}", Sha256::digest(text.as_bytes())))
}

/// Removes archives of other builds of the same image, except young ones, which may be in use.
fn remove_older(name: &str, kept: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
        let (path, file) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let digest = file.strip_prefix(&format!("{name}-")).and_then(|rest| rest.strip_suffix(".tar"));
        let same_image = digest.is_some_and(|digest| !digest.contains('-'));
        let age = entry.metadata().and_then(|known| known.modified()).ok().and_then(|at| at.elapsed().ok());
        if same_image && path != kept && age.is_some_and(|age| age > YOUNG) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Imports the images of Switchtower, built by `hack/images.sh` in this folder, on all given nodes in parallel.
pub fn deliver_switchtower(layout: &Layout, tools: &Tools, nodes: &[Machine]) -> Result<()> {
    let work = tempfile::tempdir().context("creating a temporary folder")?;
    let convert = |(name, tag): (&str, &str)| {
        let built = tools.switchtower_images.join(format!("{name}-{}.tar", architecture()));
        let archive = work.path().join(format!("{name}.tar"));
        // ctr takes the name of an image only from docker's format.
        let (from, to) = (
            format!("oci-archive:{}", built.display()),
            format!("docker-archive:{}:{tag}", archive.display()),
        );
        run("skopeo", ["copy", "--quiet", &from, &to])
            .with_context(|| format!("reading {}, which hack/images.sh builds", built.display()))?;
        Ok(archive)
    };
    let archives = SWITCHTOWER.map(convert).into_iter().collect::<Result<Vec<_>>>()?;
    on_each(nodes, |node| archives.iter().try_for_each(|archive| import(layout, node, archive)))
}

/// Builds images, serialized with other runs by a lock.
pub fn assemble_all(tools: &Tools, images: &[Image]) -> Result<Vec<PathBuf>> {
    let folder = &tools.images;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let lock = File::create(folder.join(".lock")).context("making the lock of the images' folder")?;
    lock.lock().context("waiting for another run that assembles images")?;
    remove_unfinished(folder)?;
    let assembled = images
        .iter()
        .map(|image| assemble(image, &tools.images).with_context(|| format!("the image {}", image.name)));
    assembled.collect()
}

/// Removes the remains of interrupted runs; the caller holds the lock.
fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Imports an archive into a node's container runtime.
pub fn import(layout: &Layout, node: &Machine, archive: &Path) -> Result<()> {
    // The node has its own /var: copy the archive there.
    let inbox = layout.machine_var(&node.name).join("tmp");
    let name = archive.file_name().context("an archive without a name")?;
    let copy = inbox.join(name);
    if fs::hard_link(archive, &copy).is_err() {
        fs::copy(archive, &copy).with_context(|| format!("copying {}", archive.display()))?;
    }
    let mut command = node.command(Path::new("ctr"));
    command.args(["--namespace=k8s.io", "images", "import"]).arg(Path::new("/var/tmp").join(name));
    let result =
        finish(&mut command).with_context(|| format!("importing {} on {}", archive.display(), node.name));
    let _ = fs::remove_file(&copy);
    result.map(|_| ())
}

fn program_layer(name: &str, program: &Path, work: &Path) -> Result<PathBuf> {
    let root = work.join("root");
    fs::create_dir(&root).context("making the layer's folder")?;
    fs::copy(program, root.join(name)).with_context(|| format!("copying {}", program.display()))?;
    // Strips debug information, three quarters of a debug build. Without `strip` the image is larger.
    let _ = run("strip", [Path::new("--strip-debug"), &root.join(name)]);
    let layer = work.join("layer.tar");
    tar(&root, &layer, &["."])?;
    Ok(layer)
}

/// Writes a reproducible tar: equal files give equal bytes.
pub(super) fn tar(folder: &Path, archive: &Path, members: &[&str]) -> Result<()> {
    let mut command = std::process::Command::new("tar");
    command.args(["--create", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    command.arg("--directory").arg(folder).arg("--file").arg(archive).args(members);
    finish(&mut command).map(|_| ())
}

fn sha256(path: &Path) -> Result<String> {
    let line = run("sha256sum", [path])?;
    Ok(line.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}

/// Name of this machine's processor architecture in images.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
