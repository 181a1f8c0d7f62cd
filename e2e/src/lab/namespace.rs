//! A named network namespace, visible to `ip netns`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};

use crate::lab::cleanup::{self, Registered, Resource};

/// A network namespace, deleted when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Namespace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
    _registered: Registered,
}

impl Namespace {
    /// Creates a namespace with its loopback device up.
    ///
    /// # Errors `ip` could not create it.
    pub fn create(name: &str) -> Result<Self> {
        let registered = cleanup::register(Resource::Namespace(name.to_owned()));
        run_ip(&["netns", "add", name])?;
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        let namespace = Self(Arc::new(Inner { name: name.to_owned(), file, _registered: registered }));
        namespace.ip("link set lo up\n")?;
        Ok(namespace)
    }

    /// Name for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs lines of `ip -batch` in the namespace.
    ///
    /// # Errors
    /// A line was rejected.
    pub fn ip(&self, lines: &str) -> Result<()> {
        ip_batch(Some(&self.0.name), lines)
    }

    /// Runs `work` on a new thread inside the namespace. Sockets that it opens stay there.
    ///
    /// # Errors
    /// The namespace could not be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        run_inside(&self.0.file, &self.0.name, work)
    }

    /// Makes `command` start inside the namespace.
    pub fn wrap(&self, command: &mut Command) {
        let inner = Arc::clone(&self.0);
        // SAFETY: setns is async-signal-safe, and the closure allocates nothing unless it fails.
        unsafe { command.pre_exec(move || enter(inner.file.as_raw_fd())) };
    }

    /// Sets sysctls, given as (path below /proc/sys with dots, value).
    ///
    /// # Errors
    /// A sysctl does not exist or could not be written.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/{}", key.replace('.', "/"));
                std::fs::write(&path, value).with_context(|| format!("writing {value} to {path}"))?;
            }
            Ok(())
        })?
    }

    /// Runs a command in the namespace and returns its output.
    ///
    /// # Errors
    /// It could not be started, or failed; the message contains its standard error.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(arguments);
        self.wrap(&mut command);
        let output = command.output().with_context(|| format!("starting {program} in {}", self.0.name))?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{program} {} in {}: {}", arguments.join(" "), self.0.name, error.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Runs `work` on a new thread inside the network namespace of this file.
///
/// # Errors
/// The namespace could not be entered.
pub(crate) fn run_inside<T: Send>(file: &File, name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| -> Result<T> {
            enter(file.as_raw_fd()).with_context(|| format!("entering {name}"))?;
            Ok(work())
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn enter(descriptor: i32) -> io::Result<()> {
    // SAFETY: setns takes a descriptor and a flag; it changes the calling thread only.
    if unsafe { libc::setns(descriptor, libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs lines of `ip -batch` in a namespace, or in this process's own.
///
/// # Errors
/// A line was rejected.
pub fn ip_batch(namespace: Option<&str>, lines: &str) -> Result<()> {
    use std::io::Write as _;
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
    command.stderr(std::process::Stdio::piped());
    let mut child = command.spawn().context("starting ip (Debian package iproute2)")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes()).context("writing to ip")?;
    }
    let output = child.wait_with_output().context("waiting for ip")?;
    if !output.status.success() {
        bail!(
            "ip -batch in {}: {}\n{lines}",
            namespace.unwrap_or("the root namespace"),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

fn run_ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.context("starting ip (Debian package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
