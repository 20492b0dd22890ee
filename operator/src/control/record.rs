//! Our labels and annotations on nodes.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use crate::decide::Record;

/// Has or will have kata. Shows as a role in `kubectl get nodes`.
pub(super) const MEMBER: &str = "node-role.kubernetes.io/kata-oc";
/// Whether pods may come: `false` from before the host is touched, `true` once kata was seen to work.
pub(super) const READY: &str = "katacontainers.io/kata-runtime";

/// We have cordoned the node.
pub(super) const CORDONED: &str = "sandpod.io/cordoned";

const CLAIMED: &str = "sandpod.io/claimed";
const PREFIX: &str = "sandpod.io/prefix";
const VERSION: &str = "sandpod.io/installed-version";
const LOG_LEVEL: &str = "sandpod.io/log-level";
const CONFIGURATION: &str = "sandpod.io/configuration";
const BOOT_ID: &str = "sandpod.io/boot-id";
const SOFTWARE: &str = "sandpod.io/verified-on";
const LAST_ERROR: &str = "sandpod.io/last-error";
const LAST_RUN: &str = "sandpod.io/last-run";

/// Reads them. What somebody else has garbled counts as absent.
pub(super) fn read(metadata: &ObjectMeta) -> Record {
    let label = |key: &str| metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let annotation = |key: &str| {
        let annotations = metadata.annotations.as_ref();
        annotations.and_then(|annotations| annotations.get(key)).cloned()
    };
    Record {
        member: label(MEMBER).is_some(),
        claim: annotation(CLAIMED).is_some_and(|value| value == "true"),
        prefix: annotation(PREFIX),
        ready: label(READY).map(|value| value == "true"),
        version: annotation(VERSION),
        log_level: annotation(LOG_LEVEL),
        configuration: annotation(CONFIGURATION),
        boot_id: annotation(BOOT_ID),
        software: annotation(SOFTWARE),
        last_error: annotation(LAST_ERROR),
        last_run: annotation(LAST_RUN).and_then(|text| serde_json::from_str(&text).ok()),
    }
}

/// The merge patch (RFC 7386) that makes a node carry this record and nothing else of ours.
pub(super) fn patch(record: &Record) -> Value {
    let labels = BTreeMap::from([
        (MEMBER, record.member.then(String::new)),
        (READY, record.ready.map(|ready| ready.to_string())),
    ]);
    let last_run = record.last_run.as_ref().map(|run| json!(run).to_string());
    let annotations = BTreeMap::from([
        (CLAIMED, record.claim.then(|| true.to_string())),
        (PREFIX, record.prefix.clone()),
        (VERSION, record.version.clone()),
        (LOG_LEVEL, record.log_level.clone()),
        (CONFIGURATION, record.configuration.clone()),
        (BOOT_ID, record.boot_id.clone()),
        (SOFTWARE, record.software.clone()),
        (LAST_ERROR, record.last_error.clone()),
        (LAST_RUN, last_run),
    ]);
    json!({"metadata": {"labels": labels, "annotations": annotations}})
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::{decide::LastRun, report::Verb};

    fn full() -> Record {
        let time = Time("2026-01-02T03:04:05Z".parse().unwrap());
        Record {
            member: true,
            claim: true,
            prefix: Some("/opt/sandpod".into()),
            ready: Some(false),
            version: Some("0.1.0-1a2b3c4d".into()),
            log_level: Some("info".into()),
            configuration: Some("1a2b3c4d".into()),
            boot_id: Some("b".into()),
            software: Some("v1.36.3 containerd://2.4.2 Debian".into()),
            last_error: Some("no".into()),
            last_run: Some(LastRun {
                run: "u".into(),
                verb: Verb::Install,
                failures: 2,
                ended: time.clone(),
                due: time,
                purpose: "p".into(),
                refused: true,
            }),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let metadata: ObjectMeta = serde_json::from_value(patch(&full())["metadata"].clone()).unwrap();
        assert_eq!(read(&metadata), full());
    }

    #[test]
    fn what_version_0_1_has_written_is_a_claim() {
        let last_run = r#"{"run":"u","verb":"install","failures":0,"ended":"2026-01-02T03:04:05Z",
                           "due":"2026-01-02T03:04:05Z","purpose":"p"}"#;
        let labels = json!({"node-role.kubernetes.io/kata-oc": "", "katacontainers.io/kata-runtime": "true"});
        let metadata = json!({"labels": labels, "annotations": {LAST_RUN: last_run}});
        let installed = read(&serde_json::from_value(metadata).unwrap());
        assert!(installed.last_run.is_some() && installed.claimed());
        let labels = json!({"node-role.kubernetes.io/kata-oc": "", "katacontainers.io/kata-runtime": "false"});
        assert!(read(&serde_json::from_value(json!({"labels": labels})).unwrap()).claimed());
        // Another installer's.
        let labels = json!({"katacontainers.io/kata-runtime": "true"});
        assert!(read(&serde_json::from_value(json!({"labels": labels})).unwrap()).foreign());
    }

    #[test]
    fn an_empty_record_takes_everything_away() {
        let patch = patch(&Record::default());
        let keys = |part: &str| patch["metadata"][part].as_object().unwrap().clone();
        assert!(
            keys("labels")
                .values()
                .chain(keys("annotations").values())
                .all(Value::is_null)
        );
        assert_eq!((keys("labels").len(), keys("annotations").len()), (2, 9));
    }
}
