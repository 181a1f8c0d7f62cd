//! Validation of settings, with the limits of `fleet.proto`.

use std::collections::BTreeSet;

use switchtower_proto::v1::{LocalDetection, Probe, ProbeKind, ProxyMode, Settings, Trial};

use super::RefusedUpdate;
use super::pack::{Malformed, check_cidr, check_name};

/// Maximum number of probes of a trial.
const PROBES: usize = 16;
/// Maximum observation after the switch, in milliseconds.
const WINDOW: u32 = 3_600_000;
/// Maximum timeout of a probe, in milliseconds.
const TIMEOUT: u32 = 10_000;
/// Maximum path of a probe, in bytes.
const PATH: usize = 256;
/// Maximum number of address blocks in one list.
const BLOCKS: usize = 1_000;
/// Log levels; empty selects that of the command line.
const LEVELS: [&str; 6] = ["", "error", "warn", "info", "debug", "trace"];

fn malformed(what: String) -> Result<(), Malformed> {
    Err(Malformed(what))
}

/// Validates settings with their trial.
pub(super) fn check_settings(settings: &Settings) -> Result<(), RefusedUpdate> {
    check_values(settings)?;
    settings.trial.as_deref().map_or(Ok(()), check_trial)?;
    let fallback = settings.trial.as_deref().and_then(|trial| trial.fallback.as_deref());
    [settings].into_iter().chain(fallback).try_for_each(check_known)
}

/// Refuses an unknown mode, and an unknown way to recognise local pods: ignoring it would masquerade other connections
/// than requested.
fn check_known(settings: &Settings) -> Result<(), RefusedUpdate> {
    if let Err(unknown) = ProxyMode::try_from(settings.mode) {
        return Err(RefusedUpdate::unknown_feature(format!("settings with mode {}", unknown.0)));
    }
    match LocalDetection::try_from(settings.local_detection) {
        Ok(_) => Ok(()),
        Err(unknown) => {
            Err(RefusedUpdate::unknown_feature(format!("settings with local pod detection {}", unknown.0)))
        }
    }
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
    if settings.drain_gate_port > u32::from(u16::MAX) {
        return malformed(format!("port {} of the drain gate is invalid", settings.drain_gate_port));
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

#[cfg(test)]
mod tests {
    use switchtower_proto::v1::{Cidr, NackReason};

    use super::*;
    use crate::testing::{settings, settings_on_trial};

    fn tried(change: impl FnOnce(&mut Trial)) -> Settings {
        let mut settings = settings_on_trial(1_000);
        settings.trial.as_deref_mut().map(change).unwrap();
        settings
    }

    fn probed(change: impl FnOnce(&mut Probe)) -> Settings {
        tried(|trial| change(&mut trial.probes[0]))
    }

    #[test]
    fn valid_settings_accepted() {
        let with_path = probed(|probe| {
            probe.compare_source = true;
            probe.http_path = "/clientip".into();
        });
        let levels = LEVELS.map(|level| Settings { log_level: level.into(), ..settings() });
        for good in levels.iter().chain([&settings_on_trial(WINDOW), &with_path]) {
            check_settings(good).unwrap();
        }
    }

    #[test]
    fn invalid_settings_refused_with_a_reason() {
        let block = Cidr { address: vec![10, 0, 0, 1], prefix_length: 8 };
        let cases = [
            (Settings { log_level: "loud".into(), ..settings() }, "log level"),
            (Settings { drain_gate_port: 65_536, ..settings() }, "drain gate"),
            (Settings { interface: "a-name-of-16-byt".into(), ..settings() }, "interface"),
            (Settings { cluster_cidrs: vec![block.clone()], ..settings() }, "host bits"),
            (Settings { node_port_addresses: vec![Cidr::default(); BLOCKS + 1], ..settings() }, "more than"),
            (settings_on_trial(WINDOW + 1), "watches for"),
            (tried(|trial| trial.fallback = None), "no fallback"),
            (tried(|trial| trial.fallback = Some(Box::new(settings_on_trial(1)))), "of its own"),
            (tried(|trial| trial.fallback.as_mut().unwrap().cluster_cidrs = vec![block]), "host bits"),
            (tried(|trial| trial.probes.push(trial.probes[0].clone())), "two of one name"),
            (probed(|probe| probe.name.clear()), "lacks a name"),
            (probed(|probe| probe.service.clear()), "lacks a name or a Service"),
            (probed(|probe| probe.kind = 7), "no kind"),
            (probed(|probe| probe.timeout_milliseconds = TIMEOUT + 1), "waits"),
            (probed(|probe| probe.http_path = "/x".into()), "the path"),
            (
                probed(|probe| {
                    probe.compare_source = true;
                    probe.http_path = "/x HTTP/1.1\r\nHost: other".into();
                }),
                "the path",
            ),
        ];
        for (bad, reason) in cases {
            let RefusedUpdate { reason: nack, detail } = check_settings(&bad).unwrap_err();
            assert_eq!(nack, NackReason::Malformed, "{detail}");
            assert!(detail.contains(reason), "{detail:?} does not contain {reason:?}");
        }
    }

    #[test]
    fn unknown_local_detection_and_mode_refused() {
        let of_tomorrow = Settings { local_detection: 99, ..settings() };
        let behind = tried(|trial| trial.fallback = Some(Box::new(of_tomorrow.clone())));
        let mode = Settings { mode: 99, ..settings() };
        for unknown in [of_tomorrow, behind, mode] {
            assert_eq!(check_settings(&unknown).unwrap_err().reason, NackReason::UnknownFeature);
        }
    }
}
