//! The installer's pods: made from orders, and read back as runs.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, Pod};
use kube::ResourceExt;
use serde_json::{Value, json};

use super::{NAME, Options, read::has_ended};
use crate::{
    decide::{Order, Progress, Run, UnreadRun},
    report::{Problem, Report, Verb},
};

/// The label of the installer's pods.
pub(super) const COMPONENT: &str = "app.kubernetes.io/component";
/// And its value.
pub(super) const INSTALLER: &str = "installer";
/// What a pod was made for.
const ORDER: &str = "sandpod.io/order";
/// The only container.
const CONTAINER: &str = "installer";
/// The service account of the installer's pods, of which they have no token.
const ACCOUNT: &str = "sandpod-installer";
/// How long a run may take before its kubelet ends it. Unpacking to a slow disk and one restart of the CRI take a
/// minute or two; the image comes before that, and a CRI that does not come back is waited for twice.
const DEADLINE_SECONDS: i64 = 1200;

/// The pod for an order.
///
/// It is privileged for two things that nothing less gives: the device cgroup would hide /dev/kvm from the preflight,
/// and SELinux would keep it from giving the host's files their labels. It has no token for the API, and only the node
/// that it is pinned to is within its reach. It has no priority and requests nothing: for a pod of a critical priority
/// class the kubelet of a full node would end pods of users.
pub(super) fn pod(name: &str, order: &Order, options: &Options) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": {
                "app.kubernetes.io/name": "sandpod",
                COMPONENT: INSTALLER,
                "app.kubernetes.io/managed-by": NAME,
            },
            "annotations": {ORDER: json!(order).to_string()},
        },
        "spec": {
            "nodeName": order.node,
            "restartPolicy": "Never",
            "serviceAccountName": ACCOUNT,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "tolerations": [{"operator": "Exists"}],
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "terminationGracePeriodSeconds": 30,
            "containers": [container(order, options)],
            "volumes": [{"name": "host", "hostPath": {"path": "/", "type": "Directory"}}],
        },
    });
    if !options.image_pull_secrets.is_empty() {
        let secrets = options.image_pull_secrets.iter();
        pod["spec"]["imagePullSecrets"] = secrets.map(|name| json!({"name": name})).collect();
    }
    pod
}

fn container(order: &Order, options: &Options) -> Value {
    json!({
        "name": CONTAINER,
        "image": options.installer_image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments(order, options),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "securityContext": {"privileged": true, "runAsUser": 0, "readOnlyRootFilesystem": true},
        // Requests that are left out would be the limits; limits that are left out would be the namespace's own.
        "resources": {"requests": {"cpu": "0", "memory": "0"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [{"name": "host", "mountPath": "/host", "mountPropagation": "HostToContainer"}],
    })
}

fn arguments(order: &Order, options: &Options) -> Vec<String> {
    // The daemon that the node's kubelet uses, whatever else runs there.
    let cri = order.runtime.replace("cri-o", "crio");
    let mut words = vec![
        order.verb.as_str(),
        "--host-root",
        "/host",
        "--result",
        "/dev/termination-log",
        "--log-level",
        &order.log_level,
    ];
    if order.verb == Verb::Install {
        words.extend(["--payload", "/payload"]);
        if options.add_imports {
            words.push("--add-imports");
        }
    }
    for (flag, value) in [
        ("--configuration", &order.configuration),
        ("--prefix", &order.prefix),
        ("--cri", &cri),
        ("--boot-id", &order.boot_id),
    ] {
        if !value.is_empty() {
            words.extend([flag, value]);
        }
    }
    let classes = order.runtime_classes.iter().filter(|_| order.verb == Verb::Install);
    let classes: Vec<_> = classes.map(|(name, settings)| format!("{name}={settings}")).collect();
    words.extend(classes.iter().flat_map(|class| ["--runtime-class", class.as_str()]));
    if let Some(command) = &options.restart_command {
        words.extend(["--restart-command", command]);
    }
    words.into_iter().map(str::to_owned).collect()
}

/// A pod of the installer whose order cannot be read: another version of the operator has made it.
pub(super) fn unread(pod: &Pod) -> UnreadRun {
    UnreadRun {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        node: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default(),
        ended: has_ended(pod),
        deleted: pod.metadata.deletion_timestamp.is_some(),
    }
}

/// The run that a pod is; none when its order cannot be read.
pub(super) fn run(pod: &Pod) -> Option<Run> {
    let order = serde_json::from_str(pod.annotations().get(ORDER)?).ok()?;
    let created = pod.creation_timestamp()?.0;
    Some(Run {
        name: pod.name_any(),
        uid: pod.uid()?,
        order,
        created,
        deleted: pod.metadata.deletion_timestamp.is_some(),
        progress: progress(pod),
    })
}

fn progress(pod: &Pod) -> Progress {
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    let container = containers.and_then(|all| all.iter().find(|container| container.name == CONTAINER));
    let state = container.and_then(|container| container.state.as_ref());
    if let Some(terminated) = state.and_then(|state| state.terminated.as_ref()) {
        return ended(pod, terminated);
    }
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    match phase {
        // Its kubelet has given it up, perhaps without having started anything.
        "Failed" | "Succeeded" => {
            let reason = status.and_then(|status| status.reason.as_deref()).unwrap_or_default();
            let message = status.and_then(|status| status.message.as_deref()).unwrap_or_default();
            Progress::Failed {
                ended: created(pod),
                report: None,
                text: format!("the installer's pod ended without a word: {reason} {message}")
                    .trim_end()
                    .to_owned(),
            }
        }
        "Running" => Progress::Running,
        _ => Progress::Pending(state.and_then(trouble)),
    }
}

/// Why a container waits, when it is more than that it is being made.
fn trouble(state: &ContainerState) -> Option<String> {
    let waiting = state.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let message = waiting.message.as_deref().unwrap_or_default();
    (!matches!(reason, "ContainerCreating" | "PodInitializing")).then(|| format!("{reason}: {message}"))
}

fn ended(pod: &Pod, terminated: &ContainerStateTerminated) -> Progress {
    let ended = terminated
        .finished_at
        .as_ref()
        .map_or_else(|| created(pod), |time| time.0);
    let message = terminated.message.as_deref().unwrap_or_default();
    match Report::parse(message) {
        Ok(report) if terminated.exit_code == 0 && report.error.is_none() => Progress::Done { ended, report },
        Ok(
            report @ Report {
                error: Some(Problem { .. }),
                ..
            },
        ) => Progress::Failed {
            ended,
            text: report
                .error
                .as_ref()
                .map(|problem| problem.text.clone())
                .unwrap_or_default(),
            report: Some(report),
        },
        parsed => {
            let reason = terminated.reason.as_deref().unwrap_or("no reason");
            let said = parsed.err().map_or(String::new(), |error| format!("; {error}"));
            Progress::Failed {
                ended,
                report: None,
                text: format!(
                    "the installer ended with exit code {} ({reason}){said}",
                    terminated.exit_code
                ),
            }
        }
    }
}

fn created(pod: &Pod) -> jiff::Timestamp {
    pod.creation_timestamp()
        .map_or(jiff::Timestamp::UNIX_EPOCH, |time| time.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use jiff::SignedDuration;

    use super::*;
    use crate::report::{Code, Phase};

    fn options() -> Options {
        Options {
            namespace: "openshift-sandboxed-containers-operator".into(),
            installer_image: "sandpod.io/installer:0.1.0".into(),
            version: "0.1.0-1a2b3c4d".into(),
            prefix: "/opt/sandpod".into(),
            restart_command: None,
            add_imports: false,
            image_pull_secrets: Vec::new(),
            listen: ([127, 0, 0, 1], 0).into(),
            identity: "me".into(),
            retry_first: SignedDuration::from_mins(1),
            settle: SignedDuration::from_secs(45),
            api_timeout: std::time::Duration::from_secs(120),
        }
    }

    fn order() -> Order {
        Order {
            verb: Verb::Install,
            node: "worker-0".into(),
            node_uid: "5d1c".into(),
            version: "0.1.0-1a2b3c4d".into(),
            log_level: "info".into(),
            configuration: String::new(),
            runtime_classes: BTreeMap::new(),
            purpose: "01234567".into(),
            failures: 0,
            boot_id: "b".into(),
            software: "v1.36.3 containerd://2.4.2 Debian".into(),
            in_service: true,
            runtime: "containerd".into(),
            prefix: "/opt/sandpod".into(),
        }
    }

    fn with_status(status: Value) -> Pod {
        let mut value = pod("kata-install-worker-0-01234567", &order(), &options());
        value["metadata"]["uid"] = "u".into();
        value["metadata"]["creationTimestamp"] = "2026-01-02T03:04:05Z".into();
        value["status"] = status;
        serde_json::from_value(value).unwrap()
    }

    fn terminated(exit_code: i32, message: &str) -> Progress {
        let terminated =
            json!({"exitCode": exit_code, "finishedAt": "2026-01-02T03:04:15Z", "message": message, "reason": "Error"});
        let status = json!({"phase": "Failed", "containerStatuses": [{"name": "installer", "state": {"terminated": terminated},
            "image": "", "imageID": "", "ready": false, "restartCount": 0}]});
        run(&with_status(status)).unwrap().progress
    }

    #[test]
    fn a_pod_is_as_it_was_agreed() {
        let golden: Value = serde_json::from_str(include_str!("pod/installer.json")).unwrap();
        let made = pod("kata-install-worker-0-01234567", &order(), &options());
        assert_eq!(made, golden, "{made:#}");
        let typed: Pod = serde_json::from_value(made.clone()).unwrap();
        assert_eq!(
            serde_json::to_value(typed).unwrap(),
            made,
            "a field that the API does not know"
        );
    }

    #[test]
    fn a_pod_names_the_secrets_for_its_image() {
        let options = Options {
            image_pull_secrets: vec!["registry".into(), "mirror".into()],
            ..options()
        };
        let made = pod("p", &order(), &options);
        assert_eq!(
            made["spec"]["imagePullSecrets"],
            json!([{"name": "registry"}, {"name": "mirror"}])
        );
    }

    #[test]
    fn the_command_line_follows_the_options() {
        let options = Options {
            restart_command: Some("rc-service containerd restart".into()),
            ..options()
        };
        let order = Order {
            verb: Verb::Uninstall,
            log_level: "debug".into(),
            configuration: "[runtime]".into(),
            runtime: "cri-o".into(),
            prefix: "/var/lib/sandpod".into(),
            boot_id: String::new(),
            ..order()
        };
        let line = arguments(&order, &options).join(" ");
        let expected = "uninstall --host-root /host --result /dev/termination-log --log-level debug --configuration [runtime] \
                        --prefix /var/lib/sandpod --cri crio --restart-command rc-service containerd restart";
        assert_eq!(line, expected);
    }

    #[test]
    fn an_install_is_told_of_every_runtime_class() {
        let order = Order {
            runtime_classes: [("kata-debug", "[runtime]\nenable_debug = true"), ("kata-large", "")]
                .map(|(name, settings)| (name.to_owned(), settings.to_owned()))
                .into(),
            ..order()
        };
        let words = arguments(&order, &options());
        let asked: Vec<_> = words
            .windows(2)
            .filter(|pair| pair[0] == "--runtime-class")
            .map(|pair| &pair[1])
            .collect();
        assert_eq!(asked, ["kata-debug=[runtime]\nenable_debug = true", "kata-large="]);
        let verify = Order {
            verb: Verb::Verify,
            ..order
        };
        assert!(!arguments(&verify, &options()).contains(&"--runtime-class".to_owned()));
    }

    #[test]
    fn only_an_install_may_edit_and_only_where_it_is_asked_for() {
        let asked = Options {
            add_imports: true,
            ..options()
        };
        let has = |order: &Order, options: &Options| arguments(order, options).contains(&"--add-imports".to_owned());
        assert!(has(&order(), &asked) && !has(&order(), &options()));
        let verify = Order {
            verb: Verb::Verify,
            ..order()
        };
        assert!(!has(&verify, &asked));
    }

    #[test]
    fn an_order_comes_back_as_a_run() {
        let run = run(&with_status(json!({}))).unwrap();
        assert_eq!(run.order, order());
        assert_eq!(run.progress, Progress::Pending(None));
        let other: Pod = serde_json::from_value(json!({"metadata": {"name": "other"}})).unwrap();
        assert_eq!(super::run(&other), None);
    }

    #[test]
    fn how_a_pod_ended_is_read_from_its_container() {
        let done = terminated(
            0,
            r#"{"verb":"install","phase":"installed","version":"v","handlerSeen":true}"#,
        );
        assert!(matches!(done, Progress::Done { report, .. } if report.version == "v"));
        let refused = terminated(
            1,
            r#"{"verb":"install","phase":"refused","error":{"code":"NoKvm","text":"no KVM"}}"#,
        );
        let Progress::Failed {
            report: Some(report), ..
        } = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!(report.phase, Phase::Refused);
        let problem = report.error.unwrap();
        assert_eq!((problem.code, problem.text.as_str()), (Code::NoKvm, "no KVM"));
        let Progress::Failed { text, report: None, .. } = terminated(137, "") else {
            panic!("no failure");
        };
        assert!(
            text.starts_with("the installer ended with exit code 137 (Error); the installer left no report"),
            "{text}"
        );
    }

    #[test]
    fn what_keeps_a_pod_from_starting_is_read_from_its_container() {
        let waiting = |reason: &str| {
            let state = json!({"waiting": {"reason": reason, "message": "m"}});
            let status = json!({"phase": "Pending", "containerStatuses": [{"name": "installer", "state": state,
                "image": "", "imageID": "", "ready": false, "restartCount": 0}]});
            run(&with_status(status)).unwrap().progress
        };
        assert_eq!(waiting("ContainerCreating"), Progress::Pending(None));
        assert_eq!(
            waiting("ErrImagePull"),
            Progress::Pending(Some("ErrImagePull: m".into()))
        );
        let evicted = run(&with_status(
            json!({"phase": "Failed", "reason": "Evicted", "message": "disk"}),
        ));
        let expected = "the installer's pod ended without a word: Evicted disk";
        assert!(matches!(evicted.unwrap().progress, Progress::Failed { text, .. } if text == expected));
    }
}
