//! Child processes that die with this one, each in its own process group and with its output in a log file.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::lab::cleanup::{self, Registered, Resource};

/// A running program, killed on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Mutex<Child>,
    _registered: Registered,
}

impl Process {
    /// Starts `command` with standard output and error appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened, or the program cannot be started.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let open = || File::options().create(true).append(true).open(log);
        let output = open().with_context(|| format!("opening the log {}", log.display()))?;
        let errors = output.try_clone().with_context(|| format!("opening the log {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        // SAFETY: prctl is async-signal-safe and touches only the new process.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = spawn(command).with_context(|| format!("starting {name}"))?;
        let group = i32::try_from(child.id()).context("a process id out of range")?;
        let registered = cleanup::register(Resource::ProcessGroup(group));
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            child: Mutex::new(child),
            _registered: registered,
        })
    }

    pub fn id(&self) -> u32 {
        self.child().id()
    }

    /// Path of the log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything the program has logged.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Checks that the process is running.
    ///
    /// # Errors
    /// It has exited; the message contains the last lines of its log.
    pub fn check_running(&self) -> Result<()> {
        match self.child().try_wait().with_context(|| format!("checking on {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}); its log ends:\n{}", self.name, tail(&self.log, 20)),
        }
    }

    pub fn signal(&self, signal: i32) {
        let Ok(process) = i32::try_from(self.id()) else { return };
        // SAFETY: kill has no memory effects; the process is a child of this one.
        unsafe { libc::kill(process, signal) };
    }

    /// Kills the process with SIGKILL and waits until it exits.
    pub fn kill(&self) {
        let mut child = self.child();
        drop(child.kill());
        drop(child.wait());
    }

    /// Waits until the process exits.
    ///
    /// # Errors
    /// It still runs after `deadline`.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child().try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > deadline {
                bail!("{} still runs after {deadline:?}; its log ends:\n{}", self.name, tail(&self.log, 20));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Formats an exit status: `exit code 1`, `signal 9`.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

pub fn tail(path: &Path, lines: usize) -> String {
    let mut text = String::new();
    if let Ok(mut file) = File::open(path) {
        drop(file.read_to_string(&mut text));
    }
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

type Job = (Command, Sender<std::io::Result<Child>>);

/// Spawns on a thread that lives as long as this process: the kernel sends the parent-death signal when the *thread*
/// that spawned a child ends, and a test's thread ends before the laboratory that it shares.
fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                drop(answer.send(command.spawn()));
            }
        });
        Mutex::new(jobs)
    });
    let (answer, result) = channel();
    let sent = spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer));
    sent.map_err(|_| anyhow!("the spawning thread has ended"))?;
    Ok(result.recv().map_err(|_| anyhow!("the spawning thread has ended"))??)
}
