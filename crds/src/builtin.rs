//! The record of the built-in settings: a ConfigMap that the controller writes at the installation and everybody reads.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;

use crate::ProxySettings;

/// The ConfigMap that keeps the decision.
pub const CONFIG_MAP: &str = "switchtower-builtin-settings";

const SETTINGS: &str = "settings";
const ORIGIN: &str = "origin";
const EXPLANATION: &str = "explanation";
const PROBLEM: &str = "problem";

/// Where the built-in settings come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// kube-proxy's configuration.
    KubeProxy,
    /// Nothing was known of kube-proxy, and pods contradict the default.
    Pods,
    /// Nothing was known of kube-proxy: the defaults.
    Defaults,
    /// What an earlier version had.
    EarlierVersion,
    /// Somebody wrote the record.
    Other,
}

impl Origin {
    const ALL: [Self; 4] = [Self::KubeProxy, Self::Pods, Self::Defaults, Self::EarlierVersion];

    /// The word in the record.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::KubeProxy => "KubeProxy",
            Self::Pods => "Pods",
            Self::Defaults => "Defaults",
            Self::EarlierVersion => "EarlierVersion",
            Self::Other => "Other",
        }
    }
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// There are no settings in it.
    #[error("it has no key {SETTINGS}")]
    Missing,
    /// They cannot be read.
    #[error("its key {SETTINGS} does not hold settings of a ProxyProfile: {0}")]
    Settings(String),
}

/// What was decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What differs from the defaults, as a ProxyProfile would say it.
    pub settings: ProxySettings,
    /// Where it comes from.
    pub origin: Origin,
    /// Why, for people.
    pub explanation: String,
    /// What of kube-proxy's configuration could not be understood.
    pub problem: Option<String>,
}

impl Record {
    /// The ConfigMap; immutable, because an edit would change every node at the next start.
    #[must_use]
    pub fn config_map(&self) -> ConfigMap {
        // As a ProxyProfile has them, to be pasted into one. Plain data always can be written.
        let settings = serde_saphyr::to_string(&self.settings).unwrap_or_default();
        let mut data = vec![
            (SETTINGS, settings),
            (ORIGIN, self.origin.word().to_owned()),
            (EXPLANATION, self.explanation.clone()),
        ];
        data.extend(self.problem.clone().map(|problem| (PROBLEM, problem)));
        ConfigMap {
            metadata: ObjectMeta { name: Some(CONFIG_MAP.to_owned()), ..ObjectMeta::default() },
            data: Some(data.into_iter().map(|(key, text)| (key.to_owned(), text)).collect()),
            immutable: Some(true),
            ..ConfigMap::default()
        }
    }

    /// Reads it back.
    ///
    /// # Errors
    /// It has no settings, or they cannot be read.
    pub fn read(map: &ConfigMap) -> Result<Self, RecordError> {
        let text = |key: &str| map.data.as_ref().and_then(|data| data.get(key)).cloned();
        let settings = text(SETTINGS).ok_or(RecordError::Missing)?;
        let settings =
            serde_saphyr::from_str(&settings).map_err(|error| RecordError::Settings(error.to_string()))?;
        let origin = text(ORIGIN).unwrap_or_default();
        let origin = Origin::ALL.into_iter().find(|known| known.word() == origin).unwrap_or(Origin::Other);
        Ok(Self {
            settings,
            origin,
            explanation: text(EXPLANATION).unwrap_or_default(),
            problem: text(PROBLEM),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube_proxy;

    fn record(settings: ProxySettings) -> Record {
        let problem = Some("It has no key config.conf.".to_owned());
        Record { settings, origin: Origin::KubeProxy, explanation: "Taken over: \"x\"".to_owned(), problem }
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let text = "mode: ipvs\nclusterCIDR: 10.0.0.0/8,fd00::/8\nconntrack: {maxPerCore: 0}\nnodePortAddresses: [::/0]";
        for settings in [ProxySettings::default(), kube_proxy::parse(text).unwrap().settings] {
            let record = record(settings);
            assert_eq!(Record::read(&record.config_map()).unwrap(), record);
        }
        assert_eq!(record(ProxySettings::default()).config_map().immutable, Some(true));
    }

    #[test]
    fn a_damaged_record_is_an_error() {
        let mut map = record(ProxySettings::default()).config_map();
        for bad in ["{", "masqueradeAll: perhaps", "- a list"] {
            map.data.as_mut().unwrap().insert(SETTINGS.to_owned(), bad.to_owned());
            assert!(matches!(Record::read(&map), Err(RecordError::Settings(_))), "{bad}");
        }
        map.data = None;
        assert!(matches!(Record::read(&map), Err(RecordError::Missing)));
    }
}
