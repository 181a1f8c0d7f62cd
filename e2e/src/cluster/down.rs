//! Removes a cluster, complete or not, by its layout.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::layout::{Layout, STARTER, cgroup_hierarchies};
use super::shell::{run, run_line, say, wait_until};
use crate::lab::cleanup;

/// Maximum number of passes: an interrupted start may still create resources during a pass.
const ROUNDS: u8 = 3;

/// Removes processes, mounts, control groups, namespaces, links and the folder. Idempotent.
pub fn down(layout: &Layout) -> Result<()> {
    let mut found = false;
    for _ in 0..ROUNDS {
        if !remove_all(layout)? {
            break;
        }
        found = true;
    }
    if found {
        say(&format!("removed cluster {}", layout.name));
    }
    Ok(())
}

/// Returns whether a machine or the folder existed.
fn remove_all(layout: &Layout) -> Result<bool> {
    end_starter(layout)?;
    let machines = existing_machines(layout)?;
    // Nodes first: without the hub they would only retry.
    for machine in machines.iter().rev() {
        end_processes(machine).with_context(|| format!("ending the processes of {machine}"))?;
    }
    if Path::new("/sys/class/net").join(layout.host_link()).exists() {
        run_line(&format!("ip link delete {}", layout.host_link()))?;
    }
    for machine in &machines {
        run_line(&format!("ip netns delete {machine}"))?;
    }
    unmount_below(&layout.dir)?;
    remove_cgroups(layout)?;
    let folder = layout.dir.exists();
    if folder {
        fs::remove_dir_all(&layout.dir).with_context(|| format!("removing {}", layout.dir.display()))?;
    }
    Ok(folder || !machines.is_empty())
}

/// Kills a running start of this cluster, which survives, for example, when only its `make` is killed. This process
/// may be that start, turned into a removal by an interrupt.
fn end_starter(layout: &Layout) -> Result<()> {
    let Ok(id) = fs::read_to_string(layout.dir.join(STARTER)) else { return Ok(()) };
    if id == cleanup::run_id() || cleanup::running(&id).is_none() {
        return Ok(());
    }
    wait_until("the end of the running start", Duration::from_secs(10), || {
        let Some(process) = cleanup::running(&id) else { return Ok(()) };
        let _ = run("kill", ["-KILL", &process.to_string()]);
        bail!("process {process} still runs")
    })
}

/// Network namespaces with the cluster's names, for any number of nodes.
fn existing_machines(layout: &Layout) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(names) };
    for entry in entries {
        let name = entry.context("reading /run/netns")?.file_name().to_string_lossy().into_owned();
        let ours = name == layout.hub()
            || name
                .strip_prefix(&format!("{}-node-", layout.name))
                .is_some_and(|number| number.parse::<u8>().is_ok());
        if ours {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Kills all processes in the machine's network namespace. The machine's first process is one of them; the
/// containers, which have their own network namespaces, end with it.
fn end_processes(machine: &str) -> Result<()> {
    wait_until("the end of the machine's processes", Duration::from_secs(20), || {
        let pids = run_line(&format!("ip netns pids {machine}"))?;
        let pids: Vec<&str> = pids.split_whitespace().collect();
        if pids.is_empty() {
            return Ok(());
        }
        // kill fails if a process has exited since it was listed.
        let _ = run("kill", ["-KILL"].iter().chain(&pids));
        bail!("{} still run", pids.len())
    })
}

/// Unmounts everything in the host's mount namespace: mounts there are not intended and were inherited.
fn unmount_below(dir: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let dir = dir.to_string_lossy();
    let targets = table.lines().filter_map(|line| line.split_whitespace().nth(1));
    let mut below: Vec<&str> = targets.filter(|target| target.starts_with(&format!("{dir}/"))).collect();
    below.sort_unstable_by(|left, right| right.cmp(left));
    for target in below {
        run("umount", ["--lazy", target])?;
    }
    Ok(())
}

/// Removes the cluster's group in every cgroup hierarchy, children first, and the shared parent with the last
/// cluster.
pub fn remove_cgroups(layout: &Layout) -> Result<()> {
    for hierarchy in cgroup_hierarchies()? {
        let group = hierarchy.join(layout.cgroup());
        if group.exists() {
            wait_until("removing control groups", Duration::from_secs(10), || remove_group(&group))?;
        }
        if let Some(parent) = group.parent() {
            // Fails while another cluster has its groups there, or if it does not exist.
            let _ = fs::remove_dir(parent);
        }
    }
    Ok(())
}

fn remove_group(group: &Path) -> Result<()> {
    for entry in fs::read_dir(group).with_context(|| format!("reading {}", group.display()))? {
        let entry = entry.with_context(|| format!("reading {}", group.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path())?;
        }
    }
    fs::remove_dir(group).with_context(|| format!("removing the control group {}", group.display()))
}
