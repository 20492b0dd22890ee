//! A real node: what users of Kubernetes see of pods that run in virtual machines.

use std::{collections::BTreeSet, time::Duration};

use nix::sys::utsname::uname;
use serde_json::{Value, json};
use tests::{
    census,
    cluster::NODE,
    failure::{Failure, Result, Trying, claim, contains, same},
    images::{GREETING, HELLO, HELLO_PORT, TEST},
    run,
};

use crate::ground::{CPU_OVERHEAD, Ground, READY, Story, container, manifest};

pub const STORIES: &[Story] = &[
    (
        "every_kind_of_workload_runs_in_machines_of_its_own",
        every_kind_of_workload_runs_in_machines_of_its_own,
    ),
    ("probes_decide", probes_decide),
    ("a_config_map_is_followed", a_config_map_is_followed),
    ("a_pod_is_resized_in_place", a_pod_is_resized_in_place),
    (
        "an_ordinary_pod_is_resized_in_place",
        an_ordinary_pod_is_resized_in_place,
    ),
    ("too_much_memory_is_in_the_status", too_much_memory_is_in_the_status),
];

/// How long the kubelet may take to act on what it has been told.
const SOON: Duration = Duration::from_secs(60);

/// The container of the guide's example, with its security context.
pub fn hello() -> Value {
    json!({
        "name": "hello-openshift",
        "image": HELLO,
        "imagePullPolicy": "Never",
        "ports": [{ "containerPort": HELLO_PORT }],
        "securityContext": {
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "runAsNonRoot": true,
            "runAsUser": 1001,
            "capabilities": { "drop": ["ALL"] },
            "seccompProfile": { "type": "RuntimeDefault" },
        },
    })
}

/// An object of each kind that makes pods from a template, one pod each.
fn workloads() -> Vec<Value> {
    let of = |version: &str, kind: &str| {
        let name = format!("hello-{}", kind.to_lowercase());
        let labels = json!({ "app": name, "story": "workloads" });
        let specification =
            json!({ "runtimeClassName": "kata", "terminationGracePeriodSeconds": 1, "containers": [hello()] });
        let mut object = json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name, "labels": labels } });
        if kind == "Pod" {
            object["spec"] = specification;
            return object;
        }
        let selector = match kind {
            "ReplicationController" => labels.clone(),
            _ => json!({ "matchLabels": labels }),
        };
        object["spec"] = json!({
            "replicas": 1,
            "selector": selector,
            "template": { "metadata": { "labels": labels }, "spec": specification },
        });
        if kind == "StatefulSet" {
            object["spec"]["serviceName"] = json!(name);
        }
        object
    };
    vec![
        of("v1", "Pod"),
        of("apps/v1", "ReplicaSet"),
        of("v1", "ReplicationController"),
        of("apps/v1", "StatefulSet"),
        of("apps/v1", "Deployment"),
    ]
}

/// The guide's hello pod, alone and made by each kind of object: each has a kernel and a QEMU of its own, answers at
/// its address, and can be looked into.
fn every_kind_of_workload_runs_in_machines_of_its_own(ground: &Ground) -> Result {
    let (api, workloads) = (ground.api(), workloads());
    api.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": workloads }).to_string())?;
    let kinds: Vec<_> = workloads.iter().map(named).collect();
    let counted = ["replicaset", "replicationcontroller", "statefulset", "deployment"];
    for (kind, object) in counted.iter().zip(&kinds[1..]) {
        // A controller counts its ready pods itself.
        api.wait_for("jsonpath={.status.readyReplicas}=1", &[object], READY)
            .map_err(|failure| Failure::Claim(format!("{kind}: {failure}")))?;
    }
    api.wait_for("condition=Ready", &[&kinds[0]], READY)?;
    let pods = api.json(["get", "pods", "--selector", "story=workloads"])?;
    let pods = pods["items"].as_array().cloned().unwrap_or_default();
    same("the number of pods", pods.len(), workloads.len())?;
    let mut machines = BTreeSet::new();
    for pod in &pods {
        machines.insert(is_a_machine(ground, pod)?);
        answers(ground, pod)?;
    }
    same("the machines", machines.len(), pods.len())?;
    statistics(ground, &pods)?;
    an_exec_ends_as_its_program(ground, &pods[0])?;
    the_node_and_the_class_are_as_told(ground)?;
    let objects: Vec<_> = kinds.iter().map(String::as_str).collect();
    ground.remove(&objects)
}

/// Looks into a pod's machine: its kernel is not the node's, and its one QEMU is among the pod's processes. Returns
/// what tells the machine from others.
fn is_a_machine(ground: &Ground, pod: &Value) -> Result<String> {
    let name = text(&pod["metadata"]["name"]);
    let looked = ground.shell(name, "uname -r; cat /proc/sys/kernel/random/boot_id; id -u")?;
    let lines: Vec<_> = looked.lines().collect();
    let &[kernel, boot, user] = lines.as_slice() else {
        return Err(Failure::Claim(format!("{name} said {looked:?}")));
    };
    let host = uname().map_err(std::io::Error::from).trying("asking for the kernel")?;
    claim(
        host.release().to_string_lossy() != kernel,
        format!("{name} runs on the node's kernel"),
    )?;
    same("the user", user, "1001")?;
    let label = format!("io.kubernetes.pod.uid={}", text(&pod["metadata"]["uid"]));
    let sandbox = ground.node().crictl(["pods", "--quiet", "--label", &label])?.text();
    let processes = ground.node().processes_of(&sandbox);
    let monitors = processes
        .iter()
        .filter(|process| process.program().starts_with("qemu"))
        .count();
    same(&format!("the QEMU processes of {name}"), monitors, 1)?;
    Ok(boot.to_owned())
}

/// A request to the pod's address is answered, and the server's log says so.
fn answers(ground: &Ground, pod: &Value) -> Result {
    let name = text(&pod["metadata"]["name"]);
    let page = ground.node().get(text(&pod["status"]["podIP"]), HELLO_PORT, "/")?;
    same("the page", page.as_str(), GREETING)?;
    let logs = ground.api().kubectl(["logs", name])?;
    contains(&format!("the log of {name}"), &logs.text(), "url:/")
}

/// The exit code of a program that kubectl runs in a pod is the program's.
fn an_exec_ends_as_its_program(ground: &Ground, pod: &Value) -> Result {
    let words = ["exec", text(&pod["metadata"]["name"]), "--", "sh", "-c", "exit 7"];
    let mut command = ground.api().kubectl_command(words)?;
    same("the exit code", run::finish(&mut command, None, SOON)?.code, 7)
}

/// The node's status lists the handler, and what a user has changed in the RuntimeClass is still so.
fn the_node_and_the_class_are_as_told(ground: &Ground) -> Result {
    let node = ground.api().json(["get", "node", NODE])?;
    let handlers = node["status"]["runtimeHandlers"].as_array();
    claim(
        handlers.into_iter().flatten().any(|handler| handler["name"] == "kata"),
        format!("the node has the handlers {handlers:?}"),
    )?;
    let class = ground.api().json(["get", "runtimeclass", "kata"])?;
    same(
        "the overhead that a user has set",
        &class["overhead"]["podFixed"]["cpu"],
        CPU_OVERHEAD,
    )
}

/// What the kubelet tells those who ask it, as `kubectl top` does by way of a server of metrics.
fn statistics(ground: &Ground, pods: &[Value]) -> Result {
    let path = format!("/api/v1/nodes/{NODE}/proxy/stats/summary");
    let summary = ground.api().kubectl(["get", "--raw", &path])?.text();
    let summary: Value = serde_json::from_str(&summary).map_err(|source| Failure::Json {
        what: path.clone(),
        source,
    })?;
    for pod in pods {
        let name = text(&pod["metadata"]["name"]);
        let of_pod = summary["pods"].as_array().into_iter().flatten();
        let found = of_pod.into_iter().find(|each| each["podRef"]["name"] == name);
        let container = found.map(|pod| &pod["containers"][0]).unwrap_or(&Value::Null);
        for figure in [
            &container["memory"]["workingSetBytes"],
            &container["cpu"]["usageCoreNanoSeconds"],
        ] {
            claim(
                figure.as_u64().is_some_and(|number| number > 0),
                format!("the kubelet knows of {name} only {container}"),
            )?;
        }
    }
    Ok(())
}

/// A pod has started when its server answers, is ready when a command in it says so, and is restarted when the server
/// does not answer any more.
fn probes_decide(ground: &Ground) -> Result {
    let mut server = hello();
    server["securityContext"] = json!({});
    // An emulated machine on a loaded node takes its time for a command.
    let asked_often = |probe: Value, failures: u32| {
        let mut probe = probe;
        probe["periodSeconds"] = json!(1);
        probe["timeoutSeconds"] = json!(20);
        probe["failureThreshold"] = json!(failures);
        probe
    };
    let request = json!({ "httpGet": { "path": "/", "port": HELLO_PORT } });
    server["startupProbe"] = asked_often(request.clone(), 100);
    server["livenessProbe"] = asked_often(request, 3);
    server["readinessProbe"] = asked_often(json!({ "exec": { "command": ["test", "-e", "/tmp/ready"] } }), 1);
    let mut specification = json!({ "terminationGracePeriodSeconds": 1, "containers": [server] });
    let (api, pod) = (ground.api(), "pod/probed");
    ground.begin("probed", &mut specification)?;
    api.wait_for("jsonpath={.status.containerStatuses[0].started}=true", &[pod], READY)?;
    let status = api.json(["get", pod])?;
    same(
        "ready before it says so",
        &status["status"]["containerStatuses"][0]["ready"],
        false,
    )?;
    ground.shell("probed", "touch /tmp/ready")?;
    api.wait_for("condition=Ready", &[pod], SOON)?;
    ground.shell("probed", "rm /hello/index.html")?;
    api.wait_for("jsonpath={.status.containerStatuses[0].restartCount}=1", &[pod], SOON)?;
    ground.remove(&[pod])
}

/// What is changed in a ConfigMap is soon read in the pod that mounts it.
fn a_config_map_is_followed(ground: &Ground) -> Result {
    let map = |colour: &str| {
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "paint" }, "data": { "colour": colour } }).to_string()
    };
    ground.api().apply(&map("red"))?;
    let mut reader = hello();
    reader["volumeMounts"] = json!([{ "name": "paint", "mountPath": "/paint" }]);
    ground.run(
        "painter",
        json!({
            "terminationGracePeriodSeconds": 1,
            "containers": [reader],
            "volumes": [{ "name": "paint", "configMap": { "name": "paint" } }],
        }),
    )?;
    let read = || ground.shell("painter", "cat /paint/colour");
    same("at first", read()?.as_str(), "red")?;
    ground.api().apply(&map("blue"))?;
    let bell = &ground.node().events().bell;
    bell.until("the new value in the pod", SOON, || match read() {
        Ok(colour) if colour == "blue" => Ok(()),
        Ok(colour) => Err(colour),
        Err(failure) => Err(failure.to_string()),
    })?;
    ground.remove(&["pod/painter", "configmap/paint"])
}

/// A running container gets more memory and processors in its machine, and nothing is restarted.
fn a_pod_is_resized_in_place(ground: &Ground) -> Result {
    ground.run("grower", grower())?;
    let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    same(
        "the limits at first",
        ground.shell("grower", limits)?.as_str(),
        "134217728\n50000 100000",
    )?;
    let memory = || -> Result<u64> {
        let total = ground.shell("grower", "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        total
            .parse()
            .map_err(|error| Failure::Claim(format!("MemTotal is {total:?}: {error}")))
    };
    let (before, machine) = (container(ground.api(), "grower")?, memory()?);
    resize(ground, "grower")?;
    same(
        "the limits then",
        ground.shell("grower", limits)?.as_str(),
        "402653184\n100000 100000",
    )?;
    // The machine grows with it, beyond what the kubelet had announced of the pod: 256 MiB, without what Linux needs to
    // manage them.
    let grown = memory()?.saturating_sub(machine) / 1024;
    claim((250..=256).contains(&grown), format!("the machine grew by {grown} MiB"))?;
    // One buffer larger than the first limit, filled.
    ground.shell("grower", "dd if=/dev/zero of=/dev/null bs=200M count=1")?;
    same("the container", container(ground.api(), "grower")?, before)?;
    ground.remove(&["pod/grower"])
}

/// The same with runc: what is above does not only seem so because the kubelet of this node would say so anyway.
fn an_ordinary_pod_is_resized_in_place(ground: &Ground) -> Result {
    let (api, pod) = (ground.api(), "pod/ordinary");
    api.apply(&manifest("ordinary", grower()))?;
    api.wait_for("condition=Ready", &[pod], READY)?;
    let uid = api.json(["get", pod])?["metadata"]["uid"].clone();
    let group = format!("{}/kubepods/burstable/pod{}", ground.node().cgroup(), text(&uid));
    let hierarchies = census::hierarchies();
    let exists = hierarchies.iter().any(|hierarchy| hierarchy.join(&group[1..]).exists());
    claim(exists, format!("there is no group {group}"))?;
    // One of the two is there: the group's file is called so in version 1 of cgroups, or in version 2.
    let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || :";
    same(
        "the limit at first",
        ground.shell("ordinary", limit)?.as_str(),
        "134217728",
    )?;
    let before = container(api, "ordinary")?;
    resize(ground, "ordinary")?;
    same("the limit then", ground.shell("ordinary", limit)?.as_str(), "402653184")?;
    same("the container", container(api, "ordinary")?, before)?;
    ground.remove(&[pod])
}

/// A pod with limits.
fn grower() -> Value {
    let mut grower = hello();
    grower["resources"] =
        json!({ "limits": { "memory": "128Mi", "cpu": "500m" }, "requests": { "memory": "128Mi", "cpu": "100m" } });
    json!({ "terminationGracePeriodSeconds": 1, "containers": [grower] })
}

/// Asks for larger limits, and waits until the kubelet says that the container has them.
fn resize(ground: &Ground, pod: &str) -> Result {
    let wanted = json!({ "limits": { "memory": "384Mi", "cpu": "1" } });
    let patch = json!({ "spec": { "containers": [{ "name": "hello-openshift", "resources": wanted }] } }).to_string();
    let api = ground.api();
    api.kubectl(["patch", "pod", pod, "--subresource", "resize", "--patch", &patch])?;
    for (resource, value) in [("memory", "384Mi"), ("cpu", "1")] {
        let condition = format!("jsonpath={{.status.containerStatuses[0].resources.limits.{resource}}}={value}");
        api.wait_for(&condition, &[&format!("pod/{pod}")], SOON)?;
    }
    Ok(())
}

/// A container that exceeds its limit is killed, and its pod's status says why.
fn too_much_memory_is_in_the_status(ground: &Ground) -> Result {
    let mut specification = json!({ "restartPolicy": "Never", "containers": [{
        "name": "greedy",
        "image": TEST,
        "imagePullPolicy": "Never",
        "command": ["tail", "/dev/zero"],
        "resources": { "limits": { "memory": "64Mi", "cpu": "1" }, "requests": { "cpu": "100m" } },
    }] });
    ground.begin("greedy", &mut specification)?;
    let reason = "jsonpath={.status.containerStatuses[0].state.terminated.reason}=OOMKilled";
    ground.api().wait_for(reason, &["pod/greedy"], READY)?;
    ground.remove(&["pod/greedy"])
}

/// An object's kind and name as kubectl takes them.
fn named(object: &Value) -> String {
    format!(
        "{}/{}",
        text(&object["kind"]).to_lowercase(),
        text(&object["metadata"]["name"])
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
