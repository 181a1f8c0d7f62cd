//! The agent's process.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use switchtower_node_agent_testing::controller::{FakeController, FakeStream};
use switchtower_node_agent_testing::fleet::Fleet;

/// The agent's program.
pub const BINARY: &str = env!("CARGO_BIN_EXE_switchtower-node-agent");

/// The agent's process, in the network namespace of the thread that starts it; it ends with the value.
pub struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    /// Starts it with the files of `directory`; it logs warnings to a file there.
    pub fn start(directory: &Path) -> Self {
        Self::start_with(&mut Command::new(BINARY), directory)
    }

    /// The same with another command.
    pub fn start_with(command: &mut Command, directory: &Path) -> Self {
        let log = directory.join("agent.log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let child = command
            .args(["--node-name", "node-1", "--log-level", "warn"])
            .arg("--bootstrap-dir")
            .arg(directory)
            .arg("--token-file")
            .arg(directory.join("token"))
            .arg("--state-dir")
            .arg(directory.join("state"))
            .stdin(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Agent { child, log }
    }

    /// Returns its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM and expects a successful exit.
    pub fn terminate(&mut self) {
        self.signal_termination();
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
    }

    /// Returns whether it handles SIGTERM, according to the kernel.
    pub fn handles_termination(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (libc::SIGTERM - 1)) != 0
    }

    /// Returns whether it has exited.
    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends SIGTERM.
    pub fn signal_termination(&self) {
        // SAFETY: the process is this test's child and not yet waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
    }

    /// Stops it (SIGSTOP) until [`Agent::resume`].
    pub fn pause(&self) {
        // SAFETY: the process is this test's child and not yet waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGSTOP) }, 0);
    }

    /// Continues it (SIGCONT).
    pub fn resume(&self) {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGCONT) }, 0);
    }

    /// Resident memory, in KiB.
    pub fn resident_kilobytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// CPU time that it has used.
    pub fn processor_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // After the program's name in parentheses: state is the third field, utime the 14th, stime the 15th.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let ticks: u64 =
            rest.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
        // USER_HZ is 100 on every architecture that Rust's Linux targets have.
        ticks as f64 / 100.0
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A controller, an agent that holds `fleet`, and its stream.
pub async fn programmed(fleet: &Fleet, directory: &Path) -> (FakeController, Agent, FakeStream) {
    let mut controller = FakeController::start("switchtower-controller").await;
    controller.write_files(directory);
    let agent = Agent::start(directory);
    let mut stream = controller.accept().await;
    stream.welcome(1, &[]).await;
    stream.update(fleet.snapshot()).await;
    let ack = stream.ack().await;
    assert_eq!((ack.generation, ack.digest.as_slice()), (fleet.generation, &fleet.digest.to_bytes()[..]));
    assert!(ack.deviations.is_none(), "{:?}", ack.deviations);
    (controller, agent, stream)
}
