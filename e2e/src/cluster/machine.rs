//! A machine of the cluster: a set of namespaces, held by a first process that reaps orphans.

use std::fs::{self, File};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::layout::Layout;
use super::shell::{run, run_line, wait_until};
use crate::lab::namespace::run_inside;

/// Folders below a machine's `/var` that programs expect.
const VAR_FOLDERS: [&str; 6] = ["lib/kubelet", "lib/containerd", "lib/cni/net.d", "log", "tmp", "cache"];

/// File in the machine's folder with the id of its first process.
const INIT: &str = "init";

#[derive(Debug, Clone)]
pub struct Machine {
    /// Name of the network namespace, the host name, and the folder.
    pub name: String,
    /// Id of the first process on the host.
    init: u32,
    logs: std::path::PathBuf,
}

impl Machine {
    /// Creates the namespaces and starts the first process, which mounts the machine's own `/var` and `/run`.
    pub fn start(layout: &Layout, name: &str) -> Result<Self> {
        fs::create_dir_all(layout.logs()).context("making the log folder")?;
        let var = layout.machine_var(name);
        for folder in VAR_FOLDERS {
            fs::create_dir_all(var.join(folder)).with_context(|| format!("making {folder} of {name}"))?;
        }
        run_line(&format!("ip netns add {name}"))?;
        run_line(&format!("ip -n {name} link set lo up"))?;
        let this = std::env::current_exe().context("finding this program's own path")?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{name}"))
            .args(["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(this)
            .args(["machine-init", "--host-name", name, "--var"])
            .arg(&var);
        let outer = detach(&mut command, &layout.logs().join(format!("{name}-init.log")))?;
        let ready = var.join("tmp/ready");
        let init = wait_until(&format!("the first process of {name}"), Duration::from_secs(10), || {
            if !ready.exists() {
                bail!("it has not finished its mounts, see {name}-init.log in {}", layout.logs().display());
            }
            child_of(outer)
        })?;
        let record = layout.machine_dir(name).join(INIT);
        fs::write(&record, init.to_string()).with_context(|| format!("writing {}", record.display()))?;
        Ok(Self { name: name.to_owned(), init, logs: layout.logs() })
    }

    /// Finds a machine that an earlier run started.
    pub fn find(layout: &Layout, name: &str) -> Result<Self> {
        let record = layout.machine_dir(name).join(INIT);
        let init =
            fs::read_to_string(&record).with_context(|| format!("{name} does not run: `make cluster`"))?;
        let init: u32 = init.parse().with_context(|| format!("{} holds no process id", record.display()))?;
        // The id may have been reused: check the process's network namespace.
        let theirs = fs::metadata(format!("/proc/{init}/ns/net")).map(|file| file.ino()).ok();
        let ours = fs::metadata(format!("/run/netns/{name}")).map(|file| file.ino()).ok();
        if theirs.is_none() || theirs != ours {
            bail!("{name} no longer runs: `make cluster-down`, then `make cluster`");
        }
        Ok(Self { name: name.to_owned(), init, logs: layout.logs() })
    }

    /// Finds all nodes of a cluster that an earlier run started.
    pub fn nodes(layout: &Layout) -> Result<Vec<Self>> {
        layout.node_names().iter().map(|name| Self::find(layout, name)).collect()
    }

    /// Prepares a command that runs inside the machine.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.init))
            .args(["--net", "--mount", "--uts", "--pid", "--wd=/", "--"])
            .arg(program);
        command
    }

    /// Starts a program that outlives this one; its output goes to `MACHINE-LABEL.log`.
    pub fn spawn(&self, label: &str, mut command: Command) -> Result<()> {
        detach(&mut command, &self.logs.join(format!("{}-{label}.log", self.name)))?;
        Ok(())
    }

    /// Kills with SIGKILL all processes that [`Machine::processes`] returns.
    ///
    /// # Errors
    /// There is none.
    pub fn kill(&self, program: &str) -> Result<()> {
        let found = self.processes(program)?;
        let found = found.iter().map(u32::to_string);
        run("kill", ["-KILL".to_owned()].into_iter().chain(found)).map(drop)
    }

    /// Returns the ids of all processes of this program in the machine's network namespace, including containers in
    /// the host network.
    ///
    /// # Errors
    /// There is none.
    pub fn processes(&self, program: &str) -> Result<Vec<u32>> {
        let pids = run_line(&format!("ip netns pids {}", self.name))?;
        let runs = |pid: &u32| {
            let path = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            path.file_name().is_some_and(|name| name == program)
        };
        let found: Vec<u32> =
            pids.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(runs).collect();
        if found.is_empty() {
            bail!("no {program} runs on {}", self.name);
        }
        Ok(found)
    }

    /// Runs `work` on a thread in the machine's network namespace.
    ///
    /// # Errors
    /// The namespace could not be entered.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.name);
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        run_inside(&file, &self.name, work)
    }

    /// Runs `work` on a thread in the network namespace of the Pod that has this address.
    ///
    /// # Errors
    /// No Pod of the machine has it, or the namespace could not be entered.
    pub fn in_pod_network<T: Send>(&self, pod: IpAddr, work: impl FnOnce() -> T + Send) -> Result<T> {
        // The CNI plugins keep the namespaces in the machine's own /var/run, which is not a link to /run.
        let folder = format!("/proc/{}/root/var/run/netns", self.init);
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))? {
            let path = entry.with_context(|| format!("reading {folder}"))?.path();
            let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            if run_inside(&file, &self.name, || UdpSocket::bind((pod, 0)).is_ok())? {
                return run_inside(&file, &self.name, work);
            }
        }
        bail!("no Pod on {} has the address {pod}", self.name)
    }

    /// Runs a command line, split at blanks, in the machine's network namespace.
    pub fn net(&self, line: &str) -> Result<String> {
        let words = ["netns", "exec", &self.name].into_iter().chain(line.split_whitespace());
        run("ip", words)
    }

    /// Writes a file below the machine's own `/var`; the path is the one inside the machine.
    pub fn write_var(&self, layout: &Layout, path: &str, content: &str) -> Result<()> {
        let inside = path.strip_prefix("/var/").with_context(|| format!("{path} is not under /var"))?;
        let outside = layout.machine_var(&self.name).join(inside);
        if let Some(folder) = outside.parent() {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        fs::write(&outside, content).with_context(|| format!("writing {}", outside.display()))
    }
}

/// Starts a program in its own process group, so that an interrupt at the terminal does not reach it.
fn detach(command: &mut Command, log: &Path) -> Result<u32> {
    let output = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let errors = output.try_clone().context("duplicating the log's descriptor")?;
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .with_context(|| format!("failed to start {program}"))?;
    Ok(child.id())
}

fn child_of(parent: u32) -> Result<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let first = children.split_whitespace().next().context("it has no child process")?;
    first.parse().with_context(|| format!("{path} holds no process id"))
}

/// Main function of the first process of a machine: prepares mounts and the host name, then reaps orphans forever.
///
/// Runs inside the new namespaces. `/run` becomes a fresh tmpfs and `/var` the given folder.
pub fn machine_init(host_name: &str, var: &Path) -> Result<()> {
    fs::write("/proc/sys/kernel/hostname", host_name).context("setting the host name")?;
    // Containers with mount propagation must see the kubelet's mounts.
    run_line("mount --make-rshared /")?;
    let var = var.to_str().context("the folder's name is not UTF-8")?;
    run("mount", ["--bind", var, "/var"])?;
    run_line("mount -t tmpfs -o mode=0755 tmpfs /run")?;
    for folder in ["/run/netns", "/run/lock"] {
        fs::create_dir_all(folder).with_context(|| format!("making {folder}"))?;
    }
    fs::write("/var/tmp/ready", "").context("reporting that the mounts are done")?;
    reap()
}

/// Reaps orphans, which would otherwise stay as zombies.
fn reap() -> Result<()> {
    loop {
        // SAFETY: a null status pointer is allowed; no memory is touched.
        let pid = unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
        if pid < 0 {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
