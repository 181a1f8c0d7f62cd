//! Label selectors, as the API has them.

use std::collections::BTreeMap;

/// All requirements must hold; an empty selector matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// The requirements.
    pub requirements: Vec<Requirement>,
}

/// A requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requirement {
    /// The label has one of the values.
    In(String, Vec<String>),
    /// It has none of them, or is absent.
    NotIn(String, Vec<String>),
    /// It is present.
    Exists(String),
    /// It is absent.
    DoesNotExist(String),
}

impl Selector {
    /// Returns true if an object with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operator_with_and_without_the_label() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let (with, without) = (labels(&[("pool", "edge")]), labels(&[]));
        let key = || "pool".to_owned();
        let cases = [
            (Requirement::In(key(), vec!["edge".into(), "core".into()]), true, false),
            (Requirement::In(key(), vec!["core".into()]), false, false),
            (Requirement::NotIn(key(), vec!["edge".into()]), false, true),
            (Requirement::NotIn(key(), vec!["core".into()]), true, true),
            (Requirement::Exists(key()), true, false),
            (Requirement::DoesNotExist(key()), false, true),
        ];
        for (requirement, expected_with, expected_without) in cases {
            let selector = Selector { requirements: vec![requirement] };
            assert_eq!(selector.matches(&with), expected_with, "{selector:?}");
            assert_eq!(selector.matches(&without), expected_without, "{selector:?}");
        }
        assert!(Selector::default().matches(&without));
        let both = vec![Requirement::Exists(key()), Requirement::In("zone".into(), vec!["a".into()])];
        assert!(!Selector { requirements: both }.matches(&with));
    }
}
