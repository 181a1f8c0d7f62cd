//! Removes everything a laboratory created: on drop, at the end of the process, and on SIGINT, SIGTERM or SIGHUP.
//!
//! Every namespace, process and directory is registered before it is used. Child processes always die with this one
//! (see [`crate::lab::process`]); [`sweep`] removes the namespaces and directories of processes that were killed with
//! SIGKILL.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// Prefix of every name that a laboratory uses, including those of the agent's kernel tests.
pub const PREFIX: &str = "stlab-";
const NAMESPACE_DIRECTORY: &str = "/run/netns";

/// A resource to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A process group, identified by its leader.
    ProcessGroup(i32),
    Namespace(String),
    /// A directory with its contents.
    Directory(PathBuf),
}

static REGISTRY: Mutex<BTreeMap<u64, Resource>> = Mutex::new(BTreeMap::new());
static INSTALL: Once = Once::new();
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A registered resource, removed on drop.
#[derive(Debug)]
pub struct Registered(u64);

impl Drop for Registered {
    fn drop(&mut self) {
        let resource = registry().remove(&self.0);
        if let Some(resource) = resource {
            remove(&resource);
        }
    }
}

/// Registers a resource for removal. Never returns once the process is interrupted, so that nothing new is created.
pub fn register(resource: Resource) -> Registered {
    INSTALL.call_once(install);
    let mut registry = registry();
    if INTERRUPTED.load(Ordering::Relaxed) {
        drop(registry);
        wait_forever();
    }
    let id = registry.last_key_value().map_or(0, |(id, _)| id + 1);
    registry.insert(id, resource);
    Registered(id)
}

/// Never returns while a signal ends this process: errors at that time are consequences of the removal.
pub fn check_interrupted() {
    if INTERRUPTED.load(Ordering::Relaxed) {
        wait_forever();
    }
}

fn wait_forever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Identifies this process in everything it creates: its id and start time, since process ids are reused.
pub fn run_id() -> String {
    let process = std::process::id();
    format!("{process}x{:x}", start_time(process).unwrap_or(0))
}

/// The running process with this [`run_id`].
pub fn running(run_id: &str) -> Option<u32> {
    let (process, start) = run_id.split_once('x')?;
    let process = process.parse::<u32>().ok()?;
    let start = u64::from_str_radix(start, 16).ok()?;
    (start_time(process) == Some(start)).then_some(process)
}

/// Removes namespaces and directories of processes that no longer run. Returns their number.
pub fn sweep() -> usize {
    let mut removed = 0;
    for name in entries(Path::new(NAMESPACE_DIRECTORY)) {
        if is_leftover(&name) {
            remove(&Resource::Namespace(name));
            removed += 1;
        }
    }
    for name in entries(&std::env::temp_dir()) {
        if is_leftover(&name) {
            remove(&Resource::Directory(std::env::temp_dir().join(name)));
            removed += 1;
        }
    }
    removed
}

fn is_leftover(name: &str) -> bool {
    let Some(id) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { return false };
    let Some((process, start)) = id.split_once('x') else { return false };
    let is_id = process.parse::<u32>().is_ok() && u64::from_str_radix(start, 16).is_ok();
    is_id && running(id).is_none()
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Start time of a process in clock ticks since boot; `None` if there is no such process.
fn start_time(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain spaces.
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

fn registry() -> MutexGuard<'static, BTreeMap<u64, Resource>> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(resource: &Resource) {
    match resource {
        Resource::ProcessGroup(leader) => kill_group(*leader),
        Resource::Namespace(name) => remove_namespace(name),
        Resource::Directory(path) => drop(std::fs::remove_dir_all(path)),
    }
}

fn kill_group(leader: i32) {
    // SAFETY: kill has no memory effects; the group was created by this process.
    unsafe { libc::kill(-leader, libc::SIGKILL) };
}

fn remove_namespace(name: &str) {
    let path = Path::new(NAMESPACE_DIRECTORY).join(name);
    if let Ok(text) = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()) {
        // SAFETY: the pointer is to a NUL-terminated string that outlives the call.
        unsafe { libc::umount2(text.as_ptr(), libc::MNT_DETACH) };
    }
    drop(std::fs::remove_file(path));
}

/// Removes processes first, so that nothing keeps a namespace busy or writes into a directory; then the rest.
fn remove_all() {
    // Both the end of `main` and a signal may call this: the second caller waits until everything is removed.
    static REMOVING: Mutex<()> = Mutex::new(());
    let _removing = REMOVING.lock().unwrap_or_else(PoisonError::into_inner);
    let resources: Vec<_> = std::mem::take(&mut *registry()).into_values().collect();
    let is_process = |resource: &&Resource| matches!(resource, Resource::ProcessGroup(_));
    resources.iter().filter(is_process).for_each(remove);
    let deadline = Instant::now() + Duration::from_millis(500);
    for resource in resources.iter().filter(is_process) {
        let Resource::ProcessGroup(leader) = resource else { continue };
        // SAFETY: as in `kill_group`; signal 0 only checks whether the group exists. waitpid reaps.
        while unsafe { libc::waitpid(*leader, std::ptr::null_mut(), libc::WNOHANG) } == 0
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    resources.iter().filter(|resource| !is_process(resource)).for_each(remove);
    if INTERRUPTED.load(Ordering::Relaxed) {
        // Lets creations that were under way finish.
        std::thread::sleep(Duration::from_millis(50));
        let own = format!("{PREFIX}{}-", run_id());
        let made_late =
            entries(Path::new(NAMESPACE_DIRECTORY)).into_iter().filter(|name| name.starts_with(&own));
        made_late.for_each(|name| remove_namespace(&name));
    }
}

extern "C" fn at_exit() {
    remove_all();
}

fn install() {
    // SAFETY: `at_exit` is a plain function without arguments and does not unwind.
    unsafe { libc::atexit(at_exit) };
    std::thread::spawn(|| {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(wait_for_signal());
        INTERRUPTED.store(true, Ordering::Relaxed);
        remove_all();
        // SAFETY: ends the process immediately; nothing of it is used afterwards.
        unsafe { libc::_exit(130) };
    });
}

async fn wait_for_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => (),
        _ = terminate.recv() => (),
        _ = hangup.recv() => (),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_processes_are_leftovers() {
        assert!(!is_leftover(&format!("{PREFIX}{}-a", run_id())));
        assert!(is_leftover(&format!("{PREFIX}{}x1-a", std::process::id())), "same id, other start time");
        assert!(!is_leftover("cni-1234"), "a foreign name");
        assert!(!is_leftover(&format!("{PREFIX}what")));
    }
}
