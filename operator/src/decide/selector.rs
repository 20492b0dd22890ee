//! `kataConfigPoolSelector`, parsed. Semantics: Kubernetes, "Labels and Selectors", and apimachinery's
//! `pkg/labels/selector.go`.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// Why a selector cannot be used. The API server lets none of these in where the schema is ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// An operator that does not exist.
    #[error("kataConfigPoolSelector: operator {0:?} is none of In, NotIn, Exists and DoesNotExist")]
    Operator(String),
    /// In or NotIn without values.
    #[error("kataConfigPoolSelector: the expression on {0:?} needs values with In and NotIn")]
    NoValues(String),
    /// Exists or DoesNotExist with values.
    #[error("kataConfigPoolSelector: the expression on {0:?} has values, which Exists and DoesNotExist do not take")]
    Values(String),
    /// A key that cannot be a label's.
    #[error("kataConfigPoolSelector: {0:?} is not a label's key")]
    Key(String),
}

/// A selector: all of its requirements have to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector(Vec<(String, Requirement)>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Parses a selector; none and an empty one select everything.
    ///
    /// # Errors
    /// The first requirement that makes no sense.
    pub fn parse(selector: Option<&LabelSelector>) -> Result<Selector, SelectorError> {
        let mut requirements = Vec::new();
        let Some(selector) = selector else {
            return Ok(Selector::default());
        };
        for (key, value) in selector.match_labels.iter().flatten() {
            requirements.push((checked(key)?, Requirement::In(BTreeSet::from([value.clone()]))));
        }
        for expression in selector.match_expressions.iter().flatten() {
            requirements.push((checked(&expression.key)?, requirement(expression)?));
        }
        Ok(Selector(requirements))
    }

    /// Whether these labels are selected.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0
            .iter()
            .all(|(key, requirement)| match (requirement, labels.get(key)) {
                (Requirement::In(values), Some(value)) => values.contains(value),
                (Requirement::In(_) | Requirement::Exists, None) | (Requirement::DoesNotExist, Some(_)) => false,
                (Requirement::NotIn(values), Some(value)) => !values.contains(value),
                (Requirement::NotIn(_) | Requirement::DoesNotExist, None) | (Requirement::Exists, Some(_)) => true,
            })
    }
}

fn checked(key: &str) -> Result<String, SelectorError> {
    let name = key.rsplit('/').next().unwrap_or_default();
    let fits = !name.is_empty() && name.len() <= 63 && key.matches('/').count() <= 1;
    let spelled = key
        .chars()
        .all(|letter| letter.is_ascii_alphanumeric() || "-_./".contains(letter));
    if fits && spelled {
        Ok(key.to_owned())
    } else {
        Err(SelectorError::Key(key.to_owned()))
    }
}

fn requirement(expression: &LabelSelectorRequirement) -> Result<Requirement, SelectorError> {
    let values: BTreeSet<String> = expression.values.iter().flatten().cloned().collect();
    let key = || expression.key.clone();
    match (expression.operator.as_str(), values.is_empty()) {
        ("In" | "NotIn", true) => Err(SelectorError::NoValues(key())),
        ("In", false) => Ok(Requirement::In(values)),
        ("NotIn", false) => Ok(Requirement::NotIn(values)),
        ("Exists" | "DoesNotExist", false) => Err(SelectorError::Values(key())),
        ("Exists", true) => Ok(Requirement::Exists),
        ("DoesNotExist", true) => Ok(Requirement::DoesNotExist),
        (other, _) => Err(SelectorError::Operator(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(json: serde_json::Value) -> Result<Selector, SelectorError> {
        Selector::parse(Some(&serde_json::from_value(json).unwrap()))
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> Result<Selector, SelectorError> {
        selector(serde_json::json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}))
    }

    fn matches(selector: &Selector, labels: &[(&str, &str)]) -> bool {
        selector.matches(
            &labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    #[test]
    fn nothing_selects_everything() {
        assert!(matches(&Selector::parse(None).unwrap(), &[]));
        assert!(matches(&selector(serde_json::json!({})).unwrap(), &[("a", "b")]));
        assert!(matches(
            &selector(serde_json::json!({"matchLabels": null, "matchExpressions": null})).unwrap(),
            &[]
        ));
    }

    #[test]
    fn each_operator_means_what_kubernetes_says() {
        // Selected with the value true, with the value false, and without the label.
        let cases = [
            ("In", &["true"][..], [true, false, false]),
            ("NotIn", &["true"], [false, true, true]),
            ("Exists", &[], [true, true, false]),
            ("DoesNotExist", &[], [false, false, true]),
        ];
        for (operator, values, expected) in cases {
            let selector = expression("zone", operator, values).unwrap();
            let found = [&[("zone", "true")][..], &[("zone", "false")], &[]].map(|labels| matches(&selector, labels));
            assert_eq!(found, expected, "{operator}");
        }
    }

    #[test]
    fn all_requirements_have_to_hold() {
        let both =
            serde_json::json!({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]});
        let selector = selector(both).unwrap();
        assert!(matches(&selector, &[("a", "1"), ("b", "")]));
        assert!(!matches(&selector, &[("a", "1")]));
        assert!(!matches(&selector, &[("b", "")]));
    }

    #[test]
    fn nonsense_is_named() {
        let said = |result: Result<Selector, SelectorError>| result.unwrap_err().to_string();
        assert_eq!(
            said(expression("a", "Gt", &["1"])),
            "kataConfigPoolSelector: operator \"Gt\" is none of In, NotIn, Exists and DoesNotExist"
        );
        assert_eq!(
            said(expression("a", "In", &[])),
            "kataConfigPoolSelector: the expression on \"a\" needs values with In and NotIn"
        );
        assert_eq!(
            said(expression("a", "Exists", &["1"])),
            "kataConfigPoolSelector: the expression on \"a\" has values, which Exists and DoesNotExist do not take"
        );
        assert_eq!(
            said(expression("a b", "Exists", &[])),
            "kataConfigPoolSelector: \"a b\" is not a label's key"
        );
    }
}
