//! Kernel settings of connection tracking, as kube-proxy sets them: only where they differ.

use std::path::{Path, PathBuf};

use switchtower_proto::v1::ConntrackSettings;

use crate::metrics::Metrics;

/// The scaled value of `nf_conntrack_max` is cut here, as kube-proxy does.
const MAXIMUM: u64 = 1_048_576;

/// Writes settings below a directory, `/proc/sys` outside of tests.
#[derive(Debug, Clone)]
pub struct Sysctls {
    root: PathBuf,
    applied: Option<ConntrackSettings>,
}

impl Sysctls {
    /// Settings below `root`.
    pub fn new(root: &Path) -> Self {
        Sysctls { root: root.to_path_buf(), applied: None }
    }

    /// Applies `settings` if they are not those of the last time. What cannot be written (a read-only `/proc`
    /// in an unprivileged container) is a warning and a metric, never a failure: an init container does it.
    pub fn apply(&mut self, settings: &ConntrackSettings, metrics: &Metrics) {
        if self.applied.as_ref() == Some(settings) {
            return;
        }
        self.applied = Some(*settings);
        metrics.sysctl_failures.set(self.write_all(settings) as i64);
    }

    /// Writes what differs; returns how many settings could not be written.
    pub fn write_all(&self, settings: &ConntrackSettings) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        wanted(settings, cores).into_iter().filter(|(name, value)| !self.write(name, *value)).count()
    }

    fn write(&self, name: &str, value: u64) -> bool {
        let path = self.root.join(name);
        let current = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        // The number of buckets is only ever raised.
        if current == Some(value) || (name == HASH_SIZE && current.is_some_and(|current| current > value)) {
            return true;
        }
        match std::fs::write(&path, value.to_string()) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(
                    path = %path.display(), value, %error,
                    "a kernel setting cannot be written; run `switchtower-node-agent sysctl` in a privileged init container"
                );
                false
            }
        }
    }
}

const HASH_SIZE: &str = "net/netfilter/nf_conntrack_buckets";

fn wanted(settings: &ConntrackSettings, cores: u64) -> Vec<(&'static str, u64)> {
    let ConntrackSettings {
        max_per_core,
        min,
        tcp_established_timeout_seconds,
        tcp_close_wait_timeout_seconds,
        tcp_be_liberal,
        udp_timeout_seconds,
        udp_stream_timeout_seconds,
    } = settings;
    let mut wanted = Vec::new();
    if *max_per_core > 0 {
        let scaled = (u64::from(*max_per_core) * cores).min(MAXIMUM).max(u64::from(*min));
        wanted.push(("net/netfilter/nf_conntrack_max", scaled));
        wanted.push((HASH_SIZE, scaled / 4));
    }
    for (name, value) in [
        ("net/netfilter/nf_conntrack_tcp_timeout_established", *tcp_established_timeout_seconds),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", *tcp_close_wait_timeout_seconds),
        ("net/netfilter/nf_conntrack_tcp_be_liberal", u64::from(*tcp_be_liberal)),
        ("net/netfilter/nf_conntrack_udp_timeout", *udp_timeout_seconds),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", *udp_stream_timeout_seconds),
    ] {
        if value > 0 {
            wanted.push((name, value));
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_set_is_wanted() {
        assert_eq!(wanted(&ConntrackSettings::default(), 4), []);
        let settings = ConntrackSettings {
            max_per_core: 32_768,
            min: 131_072,
            tcp_be_liberal: true,
            ..Default::default()
        };
        let liberal = ("net/netfilter/nf_conntrack_tcp_be_liberal", 1);
        let sized = |value| vec![("net/netfilter/nf_conntrack_max", value), (HASH_SIZE, value / 4), liberal];
        assert_eq!(wanted(&settings, 2), sized(131_072));
        assert_eq!(wanted(&settings, 8), sized(262_144));
        assert_eq!(wanted(&settings, 512), sized(MAXIMUM));
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let settings = ConntrackSettings { udp_timeout_seconds: 30, ..Default::default() };
        let sysctls = Sysctls::new(directory.path());
        assert_eq!(sysctls.write_all(&settings), 1);
        std::fs::create_dir_all(directory.path().join("net/netfilter")).unwrap();
        assert_eq!(sysctls.write_all(&settings), 0);
        let path = directory.path().join("net/netfilter/nf_conntrack_udp_timeout");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "30");
    }
}
