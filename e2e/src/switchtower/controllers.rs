//! The processes of controllers: one, and optionally a standby.

use super::*;

const STANDBY_PORT: u16 = 9453;

impl Fleet {
    /// Starts a second controller on a port of its own.
    ///
    /// # Errors
    /// The program does not start.
    pub fn start_standby(&self) -> Result<()> {
        let listen = (self.lab.root_address(), STANDBY_PORT).into();
        let process = self.controller_process(1, listen, self.standby_metrics, self.standby_admin)?;
        *lock(&self.standby) = Some(process);
        Ok(())
    }

    /// A standby keeps its admin API closed.
    pub(super) fn standby_is_active(&self) -> bool {
        lock(&self.standby).is_some() && std::net::TcpStream::connect(self.standby_admin).is_ok()
    }

    /// Sends a signal to the second controller.
    pub fn signal_standby(&self, signal: i32) {
        if let Some(process) = lock(&self.standby).as_ref() {
            process.signal(signal);
        }
    }

    /// Sends a signal to the first controller and leaves it alone.
    pub fn signal_controller(&self, signal: i32) {
        if let Some(process) = lock(&self.controller).as_ref() {
            process.signal(signal);
        }
    }

    /// All that the second controller has logged.
    pub fn standby_log(&self) -> String {
        lock(&self.standby).as_ref().map(Process::log_text).unwrap_or_default()
    }

    pub(super) fn controller_process(
        &self,
        number: u8,
        listen: SocketAddr,
        metrics: SocketAddr,
        admin: SocketAddr,
    ) -> Result<Process> {
        let kubeconfig = self.controller_kubeconfig()?;
        let mut command = Command::new(programs::workspace("switchtower-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.arg("--listen").arg(listen.to_string());
        command.arg("--metrics-listen").arg(metrics.to_string());
        command.arg("--admin-listen").arg(admin.to_string());
        command.args(["--namespace", NAMESPACE, "--replica", &format!("controller-{number}")]);
        // After SIGKILL the next one waits for so long.
        command.args(["--lease-seconds", "5"]);
        let name = if number == 0 { "controller.log".to_owned() } else { format!("controller-{number}.log") };
        command.envs(lock(&self.environment).iter().cloned());
        Process::start("switchtower-controller", command, &self.lab.directory().join(name))
    }
}
