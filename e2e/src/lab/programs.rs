//! Paths of the programs that the laboratory starts.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// Environment variable with the folder of etcd, kube-apiserver and the others; `make` sets it.
pub const CONTROL_PLANE_VARIABLE: &str = "SWITCHTOWER_CONTROL_PLANE";

/// Root of the repository, for tests: Cargo runs them in the folder of their package.
///
/// # Panics
/// The current folder does not exist.
#[allow(clippy::unwrap_used, reason = "only tests call it, in a folder of the repository")]
#[must_use]
pub fn repository() -> PathBuf {
    std::env::current_dir().unwrap().parent().unwrap().to_owned()
}

/// Path of a program of the control plane, built by `make setup`.
///
/// # Errors
/// It does not exist; the message names the command to run.
pub fn control_plane(name: &str) -> Result<PathBuf> {
    let path = match std::env::var_os(CONTROL_PLANE_VARIABLE) {
        Some(folder) => PathBuf::from(folder).join(name),
        None => newest_build()?.join(name),
    };
    if !path.exists() {
        bail!("{} does not exist: run 'make setup', which builds the control plane", path.display());
    }
    Ok(path)
}

/// Path of a program that `make setup` builds from a folder of `e2e/tools`. `make` sets the variable
/// `SWITCHTOWER_TOOL_<NAME>`; without it (plain `cargo test`), the newest build in the cache is used.
///
/// # Errors
/// It does not exist; the message names the command to run.
pub fn tool(name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(format!("SWITCHTOWER_TOOL_{}", name.to_uppercase())) {
        return Ok(path.into());
    }
    let folder = cache()?.join("tools");
    let prefix = format!("{name}-");
    let builds = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let finished = builds.filter(|build| build.file_name().to_string_lossy().starts_with(&prefix));
    let newest = finished.max_by_key(|build| build.metadata().and_then(|metadata| metadata.modified()).ok());
    newest.map(|build| build.path().join(name)).with_context(|| {
        format!("the tool {name} is not in {}: run 'make setup', which builds it", folder.display())
    })
}

fn cache() -> Result<PathBuf> {
    match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) => Ok(PathBuf::from(cache).join("switchtower")),
        (None, Some(home)) => Ok(PathBuf::from(home).join(".cache/switchtower")),
        (None, None) => bail!("neither HOME nor XDG_CACHE_HOME is set"),
    }
}

/// The newest build in the cache, used if the variable is unset (plain `cargo test`).
fn newest_build() -> Result<PathBuf> {
    let folder = cache()?.join("control-plane");
    let builds = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let finished = builds.filter(|build| !build.file_name().as_encoded_bytes().starts_with(b"."));
    let newest = finished.max_by_key(|build| build.metadata().and_then(|metadata| metadata.modified()).ok());
    newest.map(|build| build.path()).with_context(|| {
        format!("no control plane in {}: run 'make setup', which builds it", folder.display())
    })
}

/// Path of a program of this workspace: in the folder of the running program or, for a test, the folder above it.
///
/// # Errors
/// It does not exist; the message names the command to run.
pub fn workspace(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the path of this program")?;
    let folders = own.ancestors().skip(1).take(2);
    let mut candidates = folders.map(|folder| folder.join(name));
    candidates.find(|path| path.is_file()).with_context(|| {
        format!("the program {name} is not built: run 'cargo build --workspace --bins' with the same profile")
    })
}
