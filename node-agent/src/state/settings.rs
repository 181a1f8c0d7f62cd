//! What settings may say; the limits stand in `fleet.proto`.

use std::collections::BTreeSet;

use switchtower_proto::v1::{Probe, ProbeKind, Settings, Trial};

use super::pack::{Malformed, check_cidr, check_name};

/// Most probes of a trial.
const PROBES: usize = 16;
/// Longest watching, in milliseconds.
const WINDOW: u32 = 3_600_000;
/// Longest deadline of a probe, in milliseconds.
const TIMEOUT: u32 = 10_000;
/// Longest path of a probe, in bytes.
const PATH: usize = 256;
/// Most address blocks in one list.
const BLOCKS: usize = 1_000;
/// Levels of the log; empty is the command line's.
const LEVELS: [&str; 6] = ["", "error", "warn", "info", "debug", "trace"];

fn malformed(what: String) -> Result<(), Malformed> {
    Err(Malformed(what))
}

/// Checks settings with their trial.
pub(super) fn check_settings(settings: &Settings) -> Result<(), Malformed> {
    check_values(settings)?;
    settings.trial.as_deref().map_or(Ok(()), check_trial)
}

fn check_values(settings: &Settings) -> Result<(), Malformed> {
    check_name(&settings.profile)?;
    if settings.interface.len() > 15 || settings.interface.contains('\0') {
        return malformed("settings name an interface of more than 15 bytes".to_owned());
    }
    if settings.cluster_cidrs.len().max(settings.node_port_addresses.len()) > BLOCKS {
        return malformed(format!("settings list more than {BLOCKS} address blocks"));
    }
    if !LEVELS.contains(&settings.log_level.as_str()) {
        return malformed(format!("log level {:?} is unknown", settings.log_level));
    }
    settings.cluster_cidrs.iter().chain(&settings.node_port_addresses).try_for_each(check_cidr)
}

fn check_trial(trial: &Trial) -> Result<(), Malformed> {
    let Trial { probes, window_milliseconds, fallback } = trial;
    let Some(fallback) = fallback else { return malformed("a trial has no fallback".to_owned()) };
    if fallback.trial.is_some() {
        return malformed("a fallback has a trial of its own".to_owned());
    }
    check_values(fallback)?;
    if *window_milliseconds > WINDOW {
        return malformed(format!(
            "a trial watches for {window_milliseconds} ms, at most {WINDOW} are allowed"
        ));
    }
    let names: BTreeSet<&str> = probes.iter().map(|probe| probe.name.as_str()).collect();
    if probes.len() > PROBES || names.len() != probes.len() {
        return malformed(format!("a trial has more than {PROBES} probes, or two of one name"));
    }
    probes.iter().try_for_each(check_probe)
}

fn check_probe(probe: &Probe) -> Result<(), Malformed> {
    let Probe { name, namespace, service, port, timeout_milliseconds, compare_source, http_path, .. } = probe;
    [name, namespace, service, port].into_iter().try_for_each(|text| check_name(text))?;
    if name.is_empty() || namespace.is_empty() || service.is_empty() {
        return malformed("a probe lacks a name or a Service".to_owned());
    }
    if probe.kind() == ProbeKind::Unspecified {
        return malformed(format!("probe {name:?} has no kind, or one that is unknown"));
    }
    if *timeout_milliseconds > TIMEOUT {
        return malformed(format!(
            "probe {name:?} waits {timeout_milliseconds} ms, at most {TIMEOUT} are allowed"
        ));
    }
    let path_is_good = http_path.is_empty()
        || (http_path.starts_with('/')
            && http_path.len() <= PATH
            && http_path.bytes().all(|byte| byte.is_ascii_graphic()));
    if !path_is_good || (!compare_source && !http_path.is_empty()) {
        return malformed(format!("the path of probe {name:?} is not one, or nothing is to be compared"));
    }
    Ok(())
}
