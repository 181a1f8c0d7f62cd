//! Kernel settings of connection tracking, as kube-proxy sets them: only where they differ.

use std::collections::BTreeMap;
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
    /// Values from before this process set them first.
    found: BTreeMap<&'static str, u64>,
}

impl Sysctls {
    /// Settings below `root`.
    pub fn new(root: &Path) -> Self {
        Sysctls { root: root.to_path_buf(), applied: None, found: BTreeMap::new() }
    }

    /// Applies `settings` if they are not those of the last time. What they leave alone gets back the value that it
    /// had before. What cannot be written (a read-only `/proc` in an unprivileged container) is a warning and a
    /// metric, never a failure: an init container does it.
    pub fn apply(&mut self, settings: &ConntrackSettings, metrics: &Metrics) {
        if self.applied.as_ref() == Some(settings) {
            return;
        }
        let wanted = wanted(settings, cores());
        for (name, _) in &wanted {
            if let Some(value) = self.read(name) {
                self.found.entry(name).or_insert(value);
            }
        }
        let left: Vec<_> = self
            .found
            .iter()
            .filter(|(name, _)| !wanted.iter().any(|(other, _)| other == *name))
            .map(|(name, value)| (*name, *value))
            .collect();
        let failed = wanted.iter().chain(&left).filter(|(name, value)| !self.write(name, *value)).count();
        self.found.retain(|name, _| !left.iter().any(|(other, _)| other == name));
        self.applied = Some(*settings);
        metrics.sysctl_failures.set(failed as i64);
    }

    /// Writes what differs; returns how many settings could not be written.
    pub fn write_all(&self, settings: &ConntrackSettings) -> usize {
        wanted(settings, cores()).into_iter().filter(|(name, value)| !self.write(name, *value)).count()
    }

    fn read(&self, name: &str) -> Option<u64> {
        std::fs::read_to_string(self.root.join(name)).ok()?.trim().parse().ok()
    }

    fn write(&self, name: &str, value: u64) -> bool {
        let path = self.root.join(name);
        let current = self.read(name);
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

/// CPUs of the machine that are online, whatever share of them this container may use: as kube-proxy counts them.
fn cores() -> u64 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let counted = online.and_then(|list| count(&list)).filter(|count| *count > 0);
    counted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64))
}

/// How many numbers are in a list as `0-3,5`; `None` if it is none.
fn count(list: &str) -> Option<u64> {
    let ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    });
    ranges.sum()
}

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
    fn the_machines_cpus_are_counted() {
        for (list, expected) in [
            ("0\n", Some(1)),
            ("0-3\n", Some(4)),
            ("0-3,5,8-15\n", Some(13)),
            ("", None),
            ("3-0", None),
            ("a", None),
        ] {
            assert_eq!(count(list), expected, "{list:?}");
        }
        assert!(cores() > 0);
    }

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
    fn what_is_left_alone_again_gets_its_value_back() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("net/netfilter")).unwrap();
        let path = |name: &str| directory.path().join("net/netfilter").join(name);
        let (udp, liberal) = (path("nf_conntrack_udp_timeout"), path("nf_conntrack_tcp_be_liberal"));
        std::fs::write(&udp, "30\n").unwrap();
        std::fs::write(&liberal, "0\n").unwrap();
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let mut sysctls = Sysctls::new(directory.path());
        let read = || [&udp, &liberal].map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned());
        for (udp_timeout_seconds, tcp_be_liberal, expected) in
            [(10, true, ["10", "1"]), (20, false, ["20", "0"]), (0, false, ["30", "0"])]
        {
            let settings =
                ConntrackSettings { udp_timeout_seconds, tcp_be_liberal, ..ConntrackSettings::default() };
            sysctls.apply(&settings, &metrics);
            assert_eq!(read(), expected);
        }
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
