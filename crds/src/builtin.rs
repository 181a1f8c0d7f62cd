//! Record of the built-in settings: a ConfigMap that the controller writes during installation.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;

use crate::ProxySettings;

/// Name of the ConfigMap that holds the record.
pub const CONFIG_MAP: &str = "switchtower-builtin-settings";

const SETTINGS: &str = "settings";
const ORIGIN: &str = "origin";
const EXPLANATION: &str = "explanation";
const PROBLEM: &str = "problem";

/// Source of the built-in settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The configuration of kube-proxy.
    KubeProxy,
    /// No kube-proxy configuration was found, and pod addresses contradict the default.
    Pods,
    /// No kube-proxy configuration was found: the defaults.
    Defaults,
    /// The settings of an earlier version.
    EarlierVersion,
    /// The record was written by hand.
    Other,
}

impl Origin {
    const ALL: [Self; 4] = [Self::KubeProxy, Self::Pods, Self::Defaults, Self::EarlierVersion];

    /// Returns the value in the record.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KubeProxy => "KubeProxy",
            Self::Pods => "Pods",
            Self::Defaults => "Defaults",
            Self::EarlierVersion => "EarlierVersion",
            Self::Other => "Other",
        }
    }
}

/// Reason why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The record has no settings.
    #[error("it has no key {SETTINGS}")]
    Missing,
    /// The settings cannot be parsed.
    #[error("its key {SETTINGS} does not contain valid ProxyProfile settings: {0}")]
    Settings(String),
}

/// Built-in settings and their source.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Differences from the defaults, as in a ProxyProfile.
    pub settings: ProxySettings,
    /// Source of the settings.
    pub origin: Origin,
    /// Human-readable explanation.
    pub explanation: String,
    /// Parts of kube-proxy's configuration that could not be converted.
    pub problem: Option<String>,
}

impl Record {
    /// Returns the ConfigMap. It is immutable because an edit would change all nodes at the next start.
    #[must_use]
    pub fn config_map(&self) -> ConfigMap {
        // In the form of a ProxyProfile, so that users can copy it. Serialising plain data cannot fail.
        let settings = serde_saphyr::to_string(&self.settings).unwrap_or_default();
        let mut data = vec![
            (SETTINGS, settings),
            (ORIGIN, self.origin.as_str().to_owned()),
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

    /// Parses the ConfigMap.
    ///
    /// # Errors
    /// Returns an error if the settings are missing or invalid.
    pub fn read(map: &ConfigMap) -> Result<Self, RecordError> {
        let text = |key: &str| map.data.as_ref().and_then(|data| data.get(key)).cloned();
        let settings = text(SETTINGS).ok_or(RecordError::Missing)?;
        let settings =
            serde_saphyr::from_str(&settings).map_err(|error| RecordError::Settings(error.to_string()))?;
        let origin = text(ORIGIN).unwrap_or_default();
        let origin = Origin::ALL.into_iter().find(|known| known.as_str() == origin).unwrap_or(Origin::Other);
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
    fn record_survives_round_trip() {
        let text = "mode: ipvs\nclusterCIDR: 10.0.0.0/8,fd00::/8\nconntrack: {maxPerCore: 0}\nnodePortAddresses: [::/0]";
        for settings in [ProxySettings::default(), kube_proxy::parse(text).unwrap().settings] {
            let record = record(settings);
            assert_eq!(Record::read(&record.config_map()).unwrap(), record);
        }
        assert_eq!(record(ProxySettings::default()).config_map().immutable, Some(true));
    }

    #[test]
    fn damaged_record_is_an_error() {
        let mut map = record(ProxySettings::default()).config_map();
        for bad in ["{", "masqueradeAll: perhaps", "- a list"] {
            map.data.as_mut().unwrap().insert(SETTINGS.to_owned(), bad.to_owned());
            assert!(matches!(Record::read(&map), Err(RecordError::Settings(_))), "{bad}");
        }
        map.data = None;
        assert!(matches!(Record::read(&map), Err(RecordError::Missing)));
    }
}
