//! Sysctls of connection tracking, written as kube-proxy writes them: only if they differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use switchtower_proto::v1::ConntrackSettings;

use crate::metrics::Metrics;

/// Maximum scaled value of `nf_conntrack_max`, as in kube-proxy.
const MAXIMUM: u64 = 1_048_576;

/// Writes sysctls below a directory: `/proc/sys`, or another one in tests.
#[derive(Debug, Clone)]
pub(crate) struct Sysctls {
    root: PathBuf,
    applied: Option<ConntrackSettings>,
    /// Descriptions of the sysctls that are not in force.
    unset: Vec<String>,
    /// Original values, read before this process first wrote them.
    found: BTreeMap<&'static str, u64>,
}

impl Sysctls {
    /// Creates a writer for sysctls below `root`.
    pub(crate) fn new(root: &Path) -> Self {
        Sysctls { root: root.to_path_buf(), applied: None, unset: Vec::new(), found: BTreeMap::new() }
    }

    /// Applies `settings` if they differ from the last ones. A sysctl that they no longer set gets its original value
    /// back. One that cannot be written (a read-only `/proc` in an unprivileged container) causes a warning and counts
    /// in a metric, but is never a failure: an init container writes it. Returns whether [`Sysctls::unset`] changed.
    pub(crate) fn apply(&mut self, settings: &ConntrackSettings, metrics: &Metrics) -> bool {
        if self.applied.as_ref() == Some(settings) {
            return false;
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
        let outcome = |&(name, value): &(&'static str, u64)| self.write(name, value).err();
        let failures: Vec<_> = wanted.iter().chain(&left).filter_map(outcome).collect();
        failures.iter().for_each(warn);
        self.found.retain(|name, _| !left.iter().any(|(other, _)| other == name));
        self.applied = Some(*settings);
        metrics.sysctl_failures.set(failures.len() as i64);
        let unset: Vec<_> = failures.iter().map(ToString::to_string).collect();
        let changed = self.unset != unset;
        self.unset = unset;
        changed
    }

    /// Leaves the sysctls as they are, to another program. The next [`Sysctls::apply`] writes all of them. Returns whether
    /// [`Sysctls::unset`] changed.
    pub(crate) fn leave(&mut self, metrics: &Metrics) -> bool {
        self.applied = None;
        metrics.sysctl_failures.set(0);
        !std::mem::take(&mut self.unset).is_empty()
    }

    /// Returns the sysctls that are not in force: name, value, wanted value and reason.
    pub(crate) fn unset(&self) -> &[String] {
        &self.unset
    }

    /// Writes the sysctls that differ; returns those that could not be written.
    pub(crate) fn write_all(&self, settings: &ConntrackSettings) -> Vec<Unset> {
        let wanted = wanted(settings, cores()).into_iter();
        let failures: Vec<_> = wanted.filter_map(|(name, value)| self.write(name, value).err()).collect();
        failures.iter().for_each(warn);
        failures
    }

    fn read(&self, name: &str) -> Option<u64> {
        std::fs::read_to_string(self.root.join(name)).ok()?.trim().parse().ok()
    }

    fn write(&self, name: &'static str, wanted: u64) -> Result<(), Unset> {
        let current = self.read(name);
        let more = current.is_some_and(|current| current > wanted);
        // The number of buckets is never lowered.
        if current == Some(wanted) || (name == HASH_SIZE && more) {
            return Ok(());
        }
        match std::fs::write(self.root.join(name), wanted.to_string()) {
            Ok(()) => Ok(()),
            // A higher limit that a privileged process has set does no harm.
            Err(_) if is_acceptable(name, current, wanted) => Ok(()),
            Err(error) => Err(Unset { name, wanted, current, error }),
        }
    }
}

/// Returns whether a value that cannot be changed is acceptable.
fn is_acceptable(name: &str, current: Option<u64>, wanted: u64) -> bool {
    name == MAX && current.is_some_and(|current| current > wanted)
}

/// A sysctl that is not in force.
#[derive(Debug)]
pub(crate) struct Unset {
    name: &'static str,
    wanted: u64,
    current: Option<u64>,
    error: std::io::Error,
}

impl Unset {
    /// Returns whether the sysctl does not exist: connection tracking is not loaded, or lacks the feature.
    pub(crate) fn is_absent(&self) -> bool {
        self.error.kind() == std::io::ErrorKind::NotFound
    }
}

impl std::fmt::Display for Unset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Unset { name, wanted, current, error } = self;
        let name = name.rsplit('/').next().unwrap_or(name);
        match current {
            _ if self.is_absent() => {
                write!(f, "{name} does not exist, wanted {wanted}: nf_conntrack is not loaded")
            }
            Some(current) => write!(f, "{name} is {current}, wanted {wanted}: {error}"),
            None => write!(f, "{name} is unknown, wanted {wanted}: {error}"),
        }
    }
}

/// Logs a sysctl that is not in force.
fn warn(unset: &Unset) {
    if unset.is_absent() {
        tracing::warn!(%unset, "a kernel setting does not exist");
    } else {
        tracing::warn!(
            %unset,
            "a kernel setting cannot be written; run `switchtower-node-agent sysctl` in a privileged init container"
        );
    }
}

const MAX: &str = "net/netfilter/nf_conntrack_max";
const HASH_SIZE: &str = "net/netfilter/nf_conntrack_buckets";

/// Returns the number of online CPUs of the machine, not of the container, as kube-proxy counts them.
fn cores() -> u64 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let counted = online.and_then(|list| count(&list)).filter(|count| *count > 0);
    counted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64))
}

/// Counts the numbers in a list like `0-3,5`; `None` if it is malformed.
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
        wanted.push((MAX, scaled));
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
    fn cpus_of_the_machine_counted() {
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
    fn only_configured_sysctls_wanted() {
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
    fn unset_sysctl_gets_original_value_back() {
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
    fn unwritable_sysctl_counted() {
        let directory = tempfile::tempdir().unwrap();
        let settings = ConntrackSettings { udp_timeout_seconds: 30, ..Default::default() };
        let sysctls = Sysctls::new(directory.path());
        let unset = sysctls.write_all(&settings);
        assert!(unset.len() == 1 && unset[0].is_absent());
        assert!(unset[0].to_string().contains("nf_conntrack is not loaded"), "{}", unset[0]);
        std::fs::create_dir_all(directory.path().join("net/netfilter")).unwrap();
        assert!(sysctls.write_all(&settings).is_empty());
        let path = directory.path().join("net/netfilter/nf_conntrack_udp_timeout");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "30");
    }

    #[test]
    fn unset_sysctl_listed_until_in_force() {
        let directory = tempfile::tempdir().unwrap();
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let mut sysctls = Sysctls::new(directory.path());
        let settings = ConntrackSettings { tcp_be_liberal: true, ..Default::default() };
        assert!(sysctls.apply(&settings, &metrics));
        assert_eq!(sysctls.unset().len(), 1);
        assert!(!sysctls.apply(&settings, &metrics), "nothing new");
        assert!(sysctls.apply(&ConntrackSettings::default(), &metrics));
        assert!(sysctls.unset().is_empty());
    }

    #[test]
    fn higher_limit_acceptable() {
        assert!(is_acceptable(MAX, Some(2_000_000), 131_072));
        assert!(!is_acceptable(MAX, Some(65_536), 131_072));
        assert!(!is_acceptable(MAX, None, 131_072));
        assert!(!is_acceptable("net/netfilter/nf_conntrack_udp_timeout", Some(60), 30));
    }

    #[test]
    fn unwritable_sysctl_not_absent() {
        let directory = tempfile::tempdir().unwrap();
        // A directory cannot be written as a file, not even by root.
        std::fs::create_dir_all(directory.path().join(MAX)).unwrap();
        assert!(!Sysctls::new(directory.path()).write(MAX, 131_072).unwrap_err().is_absent());
    }
}
