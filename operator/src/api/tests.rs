use std::collections::BTreeSet;

use super::*;

/// The schema of the CRD, as users' clusters get it.
fn schema() -> serde_json::Value {
    let text = include_str!("../../../deploy/operator/crd.yaml");
    let crd: serde_json::Value = serde_saphyr::from_str(text).unwrap();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// A KataConfig with every field there is.
fn full() -> KataConfig {
    let names = |name: &str| vec![name.to_owned()];
    KataConfig {
        metadata: ObjectMeta {
            name: Some("cluster-kataconfig".into()),
            ..ObjectMeta::default()
        },
        spec: KataConfigSpec {
            check_node_eligibility: true,
            enable_peer_pods: true,
            log_level: LogLevel::Debug,
            kata_config_pool_selector: Some(
                serde_json::from_value(serde_json::json!({
                    "matchLabels": {"a": "b"},
                    "matchExpressions": [{"key": "c", "operator": "In", "values": ["true"]}],
                }))
                .unwrap(),
            ),
            rollout: Rollout {
                max_unavailable: Some(IntOrString::String("5%".into())),
                paused: true,
                canary: Some(BTreeMap::from([("a".to_owned(), "b".to_owned())])),
                cordon: true,
            },
            overhead: Overhead {
                cpu: Some("100m".into()),
                memory: Some("350Mi".into()),
            },
            memory_overhead_mb: Some(350),
            configuration: Some("[runtime]".into()),
            runtime_classes: vec![ClassSpec {
                name: "kata-large".into(),
                configuration: Some("[runtime]".into()),
                overhead: Overhead {
                    cpu: Some("1".into()),
                    memory: Some("1Gi".into()),
                },
            }],
        },
        status: Some(KataConfigStatus {
            runtime_classes: names("kata"),
            conditions: vec![Condition {
                kind: IN_PROGRESS.into(),
                status: "True".into(),
                last_transition_time: Time("2026-01-02T03:04:05Z".parse().unwrap()),
                reason: "Installing".into(),
                message: "Performing initial installation of kata on cluster".into(),
                observed_generation: Some(1),
            }],
            kata_nodes: KataNodes {
                node_count: 7,
                ready_node_count: 1,
                installed: names("a"),
                installing: names("b"),
                waiting_to_install: names("c"),
                failed_to_install: names("d"),
                uninstalling: names("e"),
                waiting_to_uninstall: names("f"),
                failed_to_uninstall: names("g"),
            },
            waiting_for_mco_to_start: true,
        }),
        ..serde_json::from_value(serde_json::json!({"metadata": {}})).unwrap()
    }
}

/// Every field of the value is in the schema with the same type, and every field of the schema is in the value.
fn agree(path: &str, schema: &serde_json::Value, value: &serde_json::Value) {
    match schema["type"].as_str() {
        Some("object") if schema["properties"].is_object() => {
            let known = schema["properties"].as_object().unwrap();
            let used = value
                .as_object()
                .unwrap_or_else(|| panic!("{path} is no object: {value}"));
            let names = |object: &serde_json::Map<String, serde_json::Value>| -> BTreeSet<String> {
                object.keys().cloned().collect()
            };
            assert_eq!(names(known), names(used), "{path}");
            for (key, inner) in known {
                agree(&format!("{path}.{key}"), inner, &used[key]);
            }
        }
        Some("object") if schema["additionalProperties"].is_object() => {
            for (key, inner) in value.as_object().unwrap() {
                agree(&format!("{path}.{key}"), &schema["additionalProperties"], inner);
            }
        }
        Some("object") => assert!(value.is_object(), "{path}"),
        Some("array") => agree(&format!("{path}[0]"), &schema["items"], &value[0]),
        Some("string") => assert!(value.is_string(), "{path}: {value}"),
        Some("integer") => assert!(value.is_i64(), "{path}: {value}"),
        None if schema["x-kubernetes-int-or-string"] == true => {
            assert!(value.is_string() || value.is_i64(), "{path}: {value}");
        }
        Some("boolean") => assert!(value.is_boolean(), "{path}: {value}"),
        other => panic!("{path} has type {other:?}"),
    }
}

#[test]
fn the_types_and_the_schema_have_the_same_fields() {
    let value = serde_json::to_value(full()).unwrap();
    agree("", &schema(), &value);
    assert_eq!(serde_json::from_value::<KataConfig>(value).unwrap(), full());
}

#[test]
fn a_rollout_is_so_many_nodes_or_a_part_of_them() {
    let most = |value: serde_json::Value, nodes| {
        let rollout: Rollout = serde_json::from_value(serde_json::json!({"maxUnavailable": value})).unwrap();
        rollout.most(nodes)
    };
    assert_eq!(Rollout::default().most(1000), Ok(1));
    assert_eq!(most(7.into(), 3), Ok(7));
    assert_eq!(most("5%".into(), 1000), Ok(50));
    assert_eq!(most("5%".into(), 30), Ok(1));
    assert_eq!(most("5%".into(), 3), Ok(1));
    for wrong in [
        0.into(),
        (-1).into(),
        "0%".into(),
        "101%".into(),
        "5".into(),
        "half".into(),
    ] {
        let why = most(wrong, 10).unwrap_err();
        assert!(why.starts_with("rollout.maxUnavailable: "), "{why}");
    }
}

#[test]
fn the_overhead_is_what_is_asked_for_or_the_guides() {
    let overhead = |spec: serde_json::Value| {
        let spec: KataConfigSpec = serde_json::from_value(spec).unwrap();
        spec.pod_overhead()
            .map(|overhead| (overhead.asked_for, overhead.to_string()))
    };
    let said = |asked_for, text: &str| Ok((asked_for, text.to_owned()));
    assert_eq!(overhead(serde_json::json!({})), said(false, "cpu 500m, memory 500Mi"));
    let both = serde_json::json!({"overhead": {"cpu": "100m", "memory": "350Mi"}});
    assert_eq!(overhead(both), said(true, "cpu 100m, memory 350Mi"));
    let theirs = serde_json::json!({"memoryOverheadMB": 350});
    assert_eq!(overhead(theirs), said(true, "cpu 500m, memory 350Mi"));
    let twice = serde_json::json!({"memoryOverheadMB": 350, "overhead": {"memory": "1Gi"}});
    assert!(overhead(twice).unwrap_err().contains("memoryOverheadMB"));
}

#[test]
fn the_log_levels_are_those_of_the_schema() {
    let levels = schema()["properties"]["spec"]["properties"]["logLevel"]["enum"].clone();
    let levels: Vec<LogLevel> = serde_json::from_value(levels).unwrap();
    assert_eq!(levels.len(), 7);
    for level in levels {
        assert_eq!(serde_json::to_value(level).unwrap(), level.name());
    }
}

#[test]
fn every_form_that_users_paste_means_the_defaults() {
    for spec in [
        "",
        "spec:",
        "spec: {}",
        "spec: {kataConfigPoolSelector: null}",
        "spec: {checkNodeEligibility: null, logLevel: null}",
    ] {
        let text = format!(
            "apiVersion: kataconfiguration.openshift.io/v1\nkind: KataConfig\nmetadata:\n  name: example-kataconfig\n{spec}\n"
        );
        let config: KataConfig = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(config.spec, KataConfigSpec::default(), "{spec:?}");
    }
}

#[test]
fn the_guides_sample_is_understood() {
    let text = "
apiVersion: kataconfiguration.openshift.io/v1
kind: KataConfig
metadata:
  name: cluster-kataconfig
spec:
  checkNodeEligibility: false
  logLevel: info
  kataConfigPoolSelector:
    matchLabels:
      kata: 'yes'
";
    let config: KataConfig = serde_saphyr::from_str(text).unwrap();
    let selector = config.spec.kata_config_pool_selector.unwrap();
    assert_eq!(selector.match_labels.unwrap()["kata"], "yes");
}

#[test]
fn an_empty_status_says_no_more_than_the_guide() {
    let value = serde_json::to_value(KataConfigStatus::default()).unwrap();
    assert_eq!(
        value,
        serde_json::json!({"kataNodes": {"nodeCount": 0, "readyNodeCount": 0}})
    );
}
