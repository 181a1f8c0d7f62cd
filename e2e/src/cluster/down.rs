//! Removes a cluster, whole or half started, from what its layout says.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::layout::{Layout, STARTER, cgroup_hierarchies};
use super::shell::{run, run_line, say, wait_until};
use crate::lab::cleanup;

/// How often it is looked again for what an interrupted start was making at that moment.
const ROUNDS: u8 = 3;

/// Removes processes, mounts, control groups, namespaces, links and the folder. Removing what is not
/// there is no error, so it can be repeated.
pub fn down(layout: &Layout) -> Result<()> {
    let mut found = false;
    for _ in 0..ROUNDS {
        if !remove_all(layout)? {
            break;
        }
        found = true;
    }
    if found {
        say(&format!("cluster {} is gone", layout.name));
    }
    Ok(())
}

/// Returns whether there was a machine or the folder.
fn remove_all(layout: &Layout) -> Result<bool> {
    end_starter(layout)?;
    let machines = existing_machines(layout)?;
    // Nodes first: a hub that is gone makes them retry.
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

/// Kills a start that still goes on, for example because only the `make` before it was killed. It may be this process,
/// which an interrupt turned from a start into a removal.
fn end_starter(layout: &Layout) -> Result<()> {
    let Ok(id) = fs::read_to_string(layout.dir.join(STARTER)) else { return Ok(()) };
    if id == cleanup::run_id() || cleanup::running(&id).is_none() {
        return Ok(());
    }
    wait_until("the end of the start that goes on", Duration::from_secs(10), || {
        let Some(process) = cleanup::running(&id) else { return Ok(()) };
        let _ = run("kill", ["-KILL", &process.to_string()]);
        bail!("process {process} is left")
    })
}

/// Network namespaces that carry the cluster's names, whatever number of nodes it had.
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

/// Kills what lives in the machine's network namespace. Its first process is among them, and takes
/// the containers (which have network namespaces of their own) with it.
fn end_processes(machine: &str) -> Result<()> {
    wait_until("the end of its processes", Duration::from_secs(20), || {
        let pids = run_line(&format!("ip netns pids {machine}"))?;
        let pids: Vec<&str> = pids.split_whitespace().collect();
        if pids.is_empty() {
            return Ok(());
        }
        // Those that ended meanwhile make kill fail.
        let _ = run("kill", ["-KILL"].iter().chain(&pids));
        bail!("{} are left", pids.len())
    })
}

/// Mounts in the host's own tree: none are made on purpose, so what is found was inherited.
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

/// The cluster's folder in every hierarchy of control groups, children first. The shared parent goes
/// when the last cluster does.
pub fn remove_cgroups(layout: &Layout) -> Result<()> {
    for hierarchy in cgroup_hierarchies()? {
        let group = hierarchy.join(layout.cgroup());
        if group.exists() {
            wait_until("removing control groups", Duration::from_secs(10), || remove_group(&group))?;
        }
        if let Some(parent) = group.parent() {
            // Fails while another cluster has its groups there, or if it never was.
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
