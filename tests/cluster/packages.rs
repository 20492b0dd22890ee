//! The operator as packages bring it: a Helm chart, a bundle and a catalog for OLM, a rule for NFD. Each says the same
//! as `deploy/install.yaml`, and the real schemas take it.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::Command,
    sync::{Arc, OnceLock},
};

use libtest_mimic::Trial;
use serde_json::{Value, json};
use tests::{
    failure::{Failure, Result, Trying, claim, contains, same},
    kubernetes::ApiServer,
    places,
    run::{self, finish, succeed},
    suite,
    wait::Bell,
};

/// A story and its name.
type Story = (&'static str, fn(&ApiServer) -> Result);

const STORIES: &[Story] = &[
    ("the_chart_says_what_the_manifest_says", chart),
    ("the_charts_values_reach_the_controller", values),
    ("several_controllers_outlive_a_drain", several),
    ("the_chart_brings_the_monitors_as_their_manifests_do", monitors),
    ("one_registry_is_that_of_both_images", registry),
    ("helm_installs_upgrades_and_leaves_no_node_behind", helm_installs),
    ("the_manifest_stays_while_there_is_a_kataconfig", deleted_too_early),
    ("the_bundle_says_what_the_manifest_says", bundle),
    ("olm_takes_bundle_catalog_and_subscription", olm),
    ("nfd_takes_the_rule", nfd),
    ("prometheus_finds_the_monitors", monitoring),
    ("all_packages_have_one_version", versions),
    ("the_catalog_leads_to_the_bundle", catalog),
];

/// Where the operator is.
const NAMESPACE: &str = "openshift-sandboxed-containers-operator";
/// The definition of KataConfig.
const DEFINITION: &str = "kataconfigs.kataconfiguration.openshift.io";
/// What keeps `helm uninstall` from leaving nodes behind: objects of the chart alone.
const GUARD: &str = "sandpod-operator-uninstall";

/// The stories as trials, on one API server.
pub fn trials() -> Vec<Trial> {
    let server: Arc<OnceLock<Result<ApiServer>>> = Arc::default();
    let trial = |(name, tell): &Story| {
        let (server, tell) = (Arc::clone(&server), *tell);
        suite::trial(format!("packages/{name}"), move || {
            let server = server.get_or_init(ApiServer::start).as_ref();
            tell(server.map_err(|failure| Failure::Claim(format!("there is no server: {failure}")))?)
        })
    };
    STORIES.iter().map(trial).collect()
}

fn deploy(path: &str) -> PathBuf {
    places::workspace().join("deploy").join(path)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(deploy(path)).trying(format!("reading deploy/{path}"))
}

/// The documents of a file of YAML.
fn documents(what: &str, text: &str) -> Result<Vec<Value>> {
    let parsed = serde_saphyr::from_multiple::<Value>(text);
    let parsed = parsed.map_err(|error| Failure::Claim(format!("{what} is no YAML: {error}")))?;
    Ok(parsed.into_iter().filter(|document| !document.is_null()).collect())
}

/// Objects by kind, namespace and name.
fn objects(what: &str, text: &str) -> Result<BTreeMap<String, Value>> {
    let named = |object: Value| {
        let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let kind = object["kind"].as_str().unwrap_or_default();
        (format!("{kind} {}/{}", of("namespace"), of("name")), object)
    };
    Ok(documents(what, text)?.into_iter().map(named).collect())
}

fn manifest() -> Result<BTreeMap<String, Value>> {
    objects("install.yaml", &read("install.yaml")?)
}

fn helm(server: &ApiServer, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(places::peers()?.join("helm"));
    command.args(words).env("KUBECONFIG", server.kubeconfig());
    // Where it would keep what it has of repositories.
    command.env("HOME", server.kubeconfig().with_file_name("home"));
    Ok(command)
}

/// What the chart makes with these values, as a real Helm renders it for a cluster of the API server's version.
fn rendered(server: &ApiServer, settings: &[&str]) -> Result<BTreeMap<String, Value>> {
    let chart = deploy("chart").display().to_string();
    let mut words = vec!["template", "sandpod", &chart, "--kube-version", "1.36"];
    words.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let output = succeed(&mut helm(server, &words)?, run::ORDINARY)?;
    objects("the chart", &output.text())
}

fn chart(server: &ApiServer) -> Result {
    let linted = succeed(
        &mut helm(server, &["lint", "--strict", &deploy("chart").display().to_string()])?,
        run::ORDINARY,
    )?;
    contains(
        "what helm lint says",
        &linted.text(),
        "1 chart(s) linted, 0 chart(s) failed",
    )?;
    let mut made = rendered(server, &[])?;
    made.retain(|name, _| !name.ends_with(&format!("/{GUARD}")));
    // The only difference: the definition outlives the release.
    let definition = format!("CustomResourceDefinition /{DEFINITION}");
    let metadata = made.get_mut(&definition).map(|object| object["metadata"].take());
    let kept = json!({ "name": DEFINITION, "annotations": { "helm.sh/resource-policy": "keep" } });
    same("the definition's metadata", metadata, Some(kept))?;
    if let Some(object) = made.get_mut(&definition) {
        object["metadata"] = json!({ "name": DEFINITION });
    }
    let wanted = manifest()?;
    same(
        "the objects",
        made.keys().collect::<Vec<_>>(),
        wanted.keys().collect::<Vec<_>>(),
    )?;
    for (name, object) in &wanted {
        same(name, made.get(name), Some(object))?;
    }
    Ok(())
}

fn values(server: &ApiServer) -> Result {
    let settings = [
        "image=registry.example.com/operator@sha256:00",
        "imagePullPolicy=Always",
        "installerImage=registry.example.com/installer@sha256:01",
        "version=0.2.0-1a2b3c4d",
        "replicas=2",
        "prefix=/var/lib/sandpod",
        "restartCommand=rc-service containerd restart",
        "addImports=true",
        "settle=1s",
        "retryFirst=10s",
        "imagePullSecrets[0].name=registry",
        "imagePullSecrets[1].name=mirror",
        "namespace.create=false",
        "resources.limits.memory=64Mi",
        "nodeSelector.zone=a",
        "tolerations[0].key=infra",
        "affinity.podAntiAffinity.preferredDuringSchedulingIgnoredDuringExecution=null",
    ];
    let made = rendered(server, &settings)?;
    claim(
        !made.contains_key(&format!("Namespace /{NAMESPACE}")),
        "there is a namespace",
    )?;
    let deployment = &made[&format!("Deployment {NAMESPACE}/sandpod-operator")];
    same("the replicas", &deployment["spec"]["replicas"], &json!(2))?;
    let controller = &deployment["spec"]["template"]["spec"]["containers"][0];
    same(
        "the image",
        &controller["image"],
        "registry.example.com/operator@sha256:00",
    )?;
    same("the policy", &controller["imagePullPolicy"], "Always")?;
    same(
        "the resources",
        &controller["resources"],
        &json!({ "limits": { "memory": "64Mi" } }),
    )?;
    let pod = &deployment["spec"]["template"]["spec"];
    let nodes = json!({ "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "zone": "a" });
    same("the nodes", &pod["nodeSelector"], &nodes)?;
    same(
        "the last toleration",
        &pod["tolerations"][2],
        &json!({ "key": "infra" }),
    )?;
    claim(pod["affinity"].is_object(), "there is no affinity")?;
    let secrets = &deployment["spec"]["template"]["spec"]["imagePullSecrets"];
    same(
        "the secrets",
        secrets,
        &json!([{ "name": "registry" }, { "name": "mirror" }]),
    )?;
    for (wrong, word) in [
        ("settel=1s", "settel"),
        ("settle=10", "settle"),
        ("replicas=0", "replicas"),
        ("resources.memory=1Gi", "memory"),
        ("imagePullSecrets={registry}", "imagePullSecrets"),
        ("registry=https://registry.example.com", "registry"),
        ("digests.operator=1a2b3c4d", "operator"),
        ("monitor.enable=true", "enable"),
        // Nothing would be there to be scraped.
        ("monitor.podMonitor=true", "enabled"),
    ] {
        let chart = deploy("chart").display().to_string();
        let output = finish(
            &mut helm(server, &["template", "sandpod", &chart, "--set", wrong])?,
            None,
            run::ORDINARY,
        )?;
        claim(output.code != 0, format!("{wrong} is taken"))?;
        contains("what helm says", &output.errors(), word)?;
    }
    let variables = controller["env"].as_array().into_iter().flatten();
    let set: BTreeMap<_, _> = variables
        .filter_map(|variable| Some((variable["name"].as_str()?, variable["value"].as_str()?)))
        .collect();
    let expected = [
        ("SANDPOD_ADD_IMPORTS", "true"),
        ("SANDPOD_IMAGE_PULL_SECRETS", "registry,mirror"),
        ("SANDPOD_INSTALLER_IMAGE", "registry.example.com/installer@sha256:01"),
        ("SANDPOD_PREFIX", "/var/lib/sandpod"),
        ("SANDPOD_RESTART_COMMAND", "rc-service containerd restart"),
        ("SANDPOD_RETRY_FIRST", "10s"),
        ("SANDPOD_SETTLE", "1s"),
        ("SANDPOD_VERSION", "0.2.0-1a2b3c4d"),
    ];
    same("the variables", set, BTreeMap::from(expected))
}

/// One controller may be evicted at a time, whichever leads; they are on several nodes where there are several. With one
/// alone nothing keeps its node from being drained.
fn several(server: &ApiServer) -> Result {
    let name = format!("PodDisruptionBudget {NAMESPACE}/sandpod-operator");
    let alone = rendered(server, &["replicas=1"])?;
    claim(!alone.contains_key(&name), "one controller cannot be evicted")?;
    let made = rendered(server, &["replicas=3"])?;
    let deployment = &made[&format!("Deployment {NAMESPACE}/sandpod-operator")];
    let pod = &deployment["spec"]["template"];
    let budget = made.get(&name).cloned().unwrap_or_default();
    let wanted = json!({
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": deployment["spec"]["selector"],
    });
    same("the budget", &budget["spec"], &wanted)?;
    same(
        "the budget's labels",
        &budget["metadata"]["labels"],
        &deployment["metadata"]["labels"],
    )?;
    let spread = &pod["spec"]["topologySpreadConstraints"][0];
    same(
        "what they are spread over",
        &spread["topologyKey"],
        "kubernetes.io/hostname",
    )?;
    same(
        "whom it spreads",
        &spread["labelSelector"]["matchLabels"],
        &pod["metadata"]["labels"],
    )
}

/// The chart's monitors are those of `deploy/monitoring`, where the values say nothing else.
fn monitors(server: &ApiServer) -> Result {
    let without = rendered(server, &[])?;
    let added = |settings: &[&str]| -> Result<BTreeMap<String, Value>> {
        let mut made = rendered(server, &[&["monitor.enabled=true"][..], settings].concat())?;
        made.retain(|name, _| !without.contains_key(name));
        Ok(made)
    };
    let daemon_set = format!("DaemonSet {NAMESPACE}/sandpod-monitor");
    let mut wanted = objects("daemonset.yaml", &read("monitoring/daemonset.yaml")?)?;
    claim(wanted.contains_key(&daemon_set), "daemonset.yaml has no DaemonSet")?;
    same("the monitors", &added(&[])?, &wanted)?;
    wanted.extend(objects("podmonitor.yaml", &read("monitoring/podmonitor.yaml")?)?);
    same("the monitors", &added(&["monitor.podMonitor=true"])?, &wanted)?;

    let digest = format!("sha256:{}", "1".repeat(64));
    let pinned = format!("digests.installer={digest}");
    let settings = [
        "registry=registry.example.com/sandpod",
        &pinned,
        "imagePullPolicy=Always",
        "imagePullSecrets[0].name=registry",
        "prefix=/var/lib/sandpod",
    ];
    let changed = added(&settings)?;
    let mut template = wanted[&daemon_set]["spec"]["template"].clone();
    let pod = &mut template["spec"];
    pod["containers"][0]["image"] = json!(format!("registry.example.com/sandpod/installer@{digest}"));
    pod["containers"][0]["imagePullPolicy"] = json!("Always");
    pod["imagePullSecrets"] = json!([{ "name": "registry" }]);
    // Where it is in the pod does not change: `deploy/must-gather.sh` calls it there.
    pod["volumes"][0]["hostPath"]["path"] = json!("/var/lib/sandpod");
    same("the changed pods", &changed[&daemon_set]["spec"]["template"], &template)?;
    let named = added(&["installerImage=registry.example.com/other:1"])?;
    let image = &named[&daemon_set]["spec"]["template"]["spec"]["containers"][0]["image"];
    same("the named image", image, "registry.example.com/other:1")
}

/// One value of the chart, or one word to what makes the manifest, names where both images are; digests take the place
/// of tags.
fn registry(server: &ApiServer) -> Result {
    let (place, version) = ("registry.example.com:5000/team/sandpod", env!("CARGO_PKG_VERSION"));
    let [one, two] = ["1", "2"].map(|digit| format!("sha256:{}", digit.repeat(64)));
    let named = |objects: &BTreeMap<String, Value>| {
        let deployment = &objects[&format!("Deployment {NAMESPACE}/sandpod-operator")];
        let controller = &deployment["spec"]["template"]["spec"]["containers"][0];
        let variables = controller["env"].as_array().into_iter().flatten();
        let installer = variables.filter(|variable| variable["name"] == "SANDPOD_INSTALLER_IMAGE");
        let names = [&controller["image"]]
            .into_iter()
            .chain(installer.map(|variable| &variable["value"]));
        json!(names.collect::<Vec<_>>())
    };
    let manifest = |words: &[&str]| {
        let mut script = Command::new("sh");
        let output = succeed(script.arg(deploy("operator/render.sh")).args(words), run::ORDINARY)?;
        objects("render.sh", &output.text())
    };
    let set = format!("registry={place}");
    let by_tag = json!(["operator", "installer"].map(|name| format!("{place}/{name}:{version}")));
    same("the chart's images", named(&rendered(server, &[&set])?), by_tag.clone())?;
    same("the manifest's images", named(&manifest(&[place])?), by_tag)?;
    let by_digest = json!([format!("{place}/operator@{one}"), format!("{place}/installer@{two}")]);
    let pinned = [format!("digests.operator={one}"), format!("digests.installer={two}")];
    let settings = [set.as_str(), &pinned[0], &pinned[1]];
    same(
        "the chart's images",
        named(&rendered(server, &settings)?),
        by_digest.clone(),
    )?;
    same(
        "the manifest's images",
        named(&manifest(&[place, &one, &two])?),
        by_digest,
    )?;
    let monitor = |words: &[&str]| -> Result<Value> {
        let made = manifest(&[&["--monitor"][..], words].concat())?;
        let pod = &made[&format!("DaemonSet {NAMESPACE}/sandpod-monitor")]["spec"]["template"]["spec"];
        Ok(pod["containers"][0]["image"].clone())
    };
    same(
        "the monitors' image",
        monitor(&[place])?,
        json!(format!("{place}/installer:{version}")),
    )?;
    same(
        "the monitors' image",
        monitor(&[place, &one, &two])?,
        json!(format!("{place}/installer@{two}")),
    )?;
    for (words, file) in [
        (vec![], "install.yaml"),
        (vec!["--monitor"], "monitoring/daemonset.yaml"),
    ] {
        let mut script = Command::new("sh");
        let printed = succeed(script.arg(deploy("operator/render.sh")).args(words), run::ORDINARY)?;
        same("what render.sh prints", printed.text().as_str(), read(file)?.trim_end())?;
    }
    Ok(())
}

/// A release comes, is upgraded, stays as long as there is a KataConfig, and goes; the definition stays.
fn helm_installs(server: &ApiServer) -> Result {
    let chart = deploy("chart").display().to_string();
    let run = |words: &[&str]| succeed(&mut helm(server, words)?, run::ORDINARY);
    run(&["install", "sandpod", &chart])?;
    let more = ["--set", "replicas=2", "--set", "monitor.enabled=true"];
    run(&[&["upgrade", "sandpod", &chart][..], &more].concat())?;
    let get = |kind, name| server.json(["get", kind, name, "--namespace", NAMESPACE]);
    let deployment = get("deployment", "sandpod-operator")?;
    same("the replicas", &deployment["spec"]["replicas"], &json!(2))?;
    same(
        "the budget",
        &get("poddisruptionbudget", "sandpod-operator")?["spec"]["maxUnavailable"],
        &json!(1),
    )?;
    get("daemonset", "sandpod-monitor")?;
    let config = json!({ "apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": { "name": "packaged" } });
    server.apply(&config.to_string())?;
    let refused = finish(&mut helm(server, &["uninstall", "sandpod"])?, None, run::ORDINARY)?;
    claim(
        refused.code != 0,
        "the release is gone, and with it who takes kata from the nodes",
    )?;
    let expected = "delete the KataConfig packaged first and wait until it is gone: without the operator nothing takes kata from the nodes";
    contains("what helm says", &refused.errors(), expected)?;
    server.kubectl(["get", "deployment", "sandpod-operator", "--namespace", NAMESPACE])?;
    server.kubectl(["delete", "kataconfig", "packaged"])?;
    let gone = run(&["uninstall", "sandpod"])?;
    contains(
        "what helm says",
        &gone.text(),
        "These resources were kept due to the resource policy",
    )?;
    server.kubectl(["get", "crd", DEFINITION])?;
    no_role_left(server)
}

/// The controller's rights are gone.
fn no_role_left(server: &ApiServer) -> Result {
    let left = server.kubectl([
        "get",
        "clusterrole",
        "sandpod-operator",
        "--ignore-not-found",
        "--output",
        "name",
    ])?;
    same("what is left", left.text().as_str(), "")
}

/// `kubectl delete --filename` takes nothing that the nodes need as long as there is a KataConfig, and everything
/// afterwards.
fn deleted_too_early(_: &ApiServer) -> Result {
    // Of its own: nobody here completes the removal of the namespace, in which the other stories make things.
    let server = &ApiServer::start()?;
    let file = deploy("install.yaml").display().to_string();
    server.kubectl(["apply", "--filename", &file])?;
    server.wait_for("condition=Established", &[&format!("crd/{DEFINITION}")], run::ORDINARY)?;
    let config = json!({ "apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": { "name": "early" } });
    server.apply(&config.to_string())?;
    let delete = || {
        let mut command = server.kubectl_command(["delete", "--wait=false", "--filename", &file])?;
        finish(&mut command, None, run::ORDINARY)
    };
    // A policy is in force a moment after it was made.
    let sentence = "delete the KataConfig early first and wait until it is gone";
    Bell::default().until("the policy's refusal", run::ORDINARY, || {
        let words = ["delete", "--dry-run=server", "--filename", &file];
        let mut command = server.kubectl_command(words).map_err(|failure| failure.to_string())?;
        let tried = finish(&mut command, None, run::ORDINARY).map_err(|failure| failure.to_string())?;
        if tried.errors().contains(sentence) {
            Ok(())
        } else {
            Err(tried.errors())
        }
    })?;
    let refused = delete()?;
    for kept in [
        "namespaces \"openshift-sandboxed-containers-operator\"",
        "customresourcedefinitions.apiextensions.k8s.io \"kataconfigs.kataconfiguration.openshift.io\"",
        "deployments.apps \"sandpod-operator\"",
        "clusterroles.rbac.authorization.k8s.io \"sandpod-operator\"",
        "clusterrolebindings.rbac.authorization.k8s.io \"sandpod-operator\"",
        "serviceaccounts \"sandpod-operator\"",
    ] {
        contains("what is refused", &refused.errors(), &format!("{kept} is forbidden"))?;
    }
    server.kubectl(["delete", "kataconfig", "early"])?;
    // The policies went with the first try; what they kept goes now.
    server.kubectl(["delete", "--wait=false", "--ignore-not-found", "--filename", &file])?;
    no_role_left(server)
}

/// The only document of a file.
fn document(path: &str) -> Result<Value> {
    Ok(documents(path, &read(path)?)?.into_iter().next().unwrap_or_default())
}

/// The bundle's service version, as JSON.
fn service_version() -> Result<Value> {
    document("olm/bundle/manifests/sandboxed-containers-operator.clusterserviceversion.yaml")
}

fn bundle(_: &ApiServer) -> Result {
    let (version, manifest) = (service_version()?, manifest()?);
    let install = &version["spec"]["install"]["spec"];
    let rules = |role: &str| manifest[role]["rules"].as_array().cloned().unwrap_or_default();
    let mut cluster = rules("ClusterRole /sandpod-operator");
    // A bundle cannot have a role in the namespace default.
    cluster.extend(rules("Role default/sandpod-operator-events"));
    let own = rules(&format!("Role {NAMESPACE}/sandpod-operator"));
    same(
        "the rights in the cluster",
        &install["clusterPermissions"][0]["rules"],
        &json!(cluster),
    )?;
    same(
        "the rights in the namespace",
        &install["permissions"][0]["rules"],
        &json!(own),
    )?;
    let installers = rules(&format!("Role {NAMESPACE}/sandpod-installer"));
    same(
        "the rights of the installer's pods",
        &install["permissions"][1],
        &json!({ "serviceAccountName": "sandpod-installer", "rules": installers }),
    )?;
    let deployment = &manifest[&format!("Deployment {NAMESPACE}/sandpod-operator")];
    same(
        "the deployment",
        &install["deployments"][0]["spec"],
        &deployment["spec"],
    )?;
    same(
        "its labels",
        &install["deployments"][0]["label"],
        &deployment["metadata"]["labels"],
    )?;
    let definition = "olm/bundle/manifests/kataconfiguration.openshift.io_kataconfigs.yaml";
    same("the definition", read(definition)?, read("operator/crd.yaml")?)?;
    let namespace = version["metadata"]["annotations"]["operatorframework.io/suggested-namespace-template"].as_str();
    let namespace: Value = serde_json::from_str(namespace.unwrap_or_default()).unwrap_or_default();
    let labels = namespace["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    for (label, value) in labels {
        same(
            &label,
            &manifest[&format!("Namespace /{NAMESPACE}")]["metadata"]["labels"][&label],
            &value,
        )?;
    }
    Ok(())
}

/// A file that a peer's module has, such as a definition.
fn share(name: &str) -> Result<PathBuf> {
    let path = places::peers()?.with_file_name("share").join(name);
    claim(
        path.exists(),
        format!("{} is missing: run `make peers`", path.display()),
    )?;
    Ok(path)
}

/// Makes the API server know kinds by the definitions of those who own them.
fn define(server: &ApiServer, files: &[&str], names: &[&str]) -> Result {
    for file in files {
        let path = share(file)?.display().to_string();
        // Larger than what apply may keep in an annotation.
        server.kubectl(["apply", "--server-side", "--filename", &path])?;
    }
    let names: Vec<_> = names.iter().map(|name| format!("crd/{name}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    server.wait_for("condition=Established", &names, run::ORDINARY)
}

fn olm(server: &ApiServer) -> Result {
    let bundle = deploy("olm/bundle").display().to_string();
    let mut check = Command::new(places::peers()?.join("operator-verify"));
    let checked = succeed(check.args(["manifests", &bundle]), run::ORDINARY)?;
    same("what OLM's own check finds", checked.text() + &checked.errors(), "")?;
    let kinds = [
        "catalogsources",
        "clusterserviceversions",
        "operatorgroups",
        "subscriptions",
    ];
    let files = kinds.map(|kind| format!("operators.coreos.com_{kind}.yaml"));
    let names = kinds.map(|kind| format!("{kind}.operators.coreos.com"));
    define(
        server,
        &files.each_ref().map(String::as_str),
        &names.each_ref().map(String::as_str),
    )?;
    // Helm's story may have left the namespace on its way out, which nobody completes here.
    let make = |namespace: &str, text: &str| -> Result {
        server.apply(
            &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }).to_string(),
        )?;
        let mut command = server.kubectl_command(["apply", "--validate=strict", "--filename", "-"])?;
        let output = finish(&mut command, Some(text.as_bytes().to_vec()), run::ORDINARY)?;
        claim(output.code == 0, format!("refused: {}", output.errors()))
    };
    make("olm", &read("olm/install.yaml")?.replace(NAMESPACE, "by-olm"))?;
    let mut version = service_version()?;
    version["metadata"]["namespace"] = json!("by-olm");
    make("by-olm", &version.to_string())?;
    let examples = version["metadata"]["annotations"]["alm-examples"]
        .as_str()
        .unwrap_or_default();
    let examples: Vec<Value> = serde_json::from_str(examples).unwrap_or_default();
    same("the examples", examples.len(), 1)?;
    let definition = deploy("operator/crd.yaml").display().to_string();
    server.kubectl(["apply", "--filename", &definition])?;
    server.wait_for("condition=Established", &[&format!("crd/{DEFINITION}")], run::ORDINARY)?;
    let mut command = server.kubectl_command(["create", "--dry-run=server", "--validate=strict", "--filename", "-"])?;
    let output = finish(&mut command, Some(examples[0].to_string().into_bytes()), run::ORDINARY)?;
    claim(output.code == 0, format!("the example is refused: {}", output.errors()))
}

/// NFD takes the rule, and it says what the older configuration says.
fn nfd(server: &ApiServer) -> Result {
    define(server, &["nfd-api-crds.yaml"], &["nodefeaturerules.nfd.k8s-sigs.io"])?;
    let path = deploy("nfd/nodefeaturerule.yaml").display().to_string();
    server.kubectl(["create", "--validate=strict", "--filename", &path])?;
    let rule = server.json(["get", "nodefeaturerule", "sandpod"])?;
    let rule = &rule["spec"]["rules"][0];
    let older = documents("worker.conf", &read("nfd/worker.conf")?)?;
    let older = &older[0]["sources"]["custom"][0];
    same(
        "the label",
        &rule["labels"],
        &json!({ older["name"].as_str().unwrap_or_default(): "true" }),
    )?;
    let names = |matcher: &Value| {
        matcher["matchExpressions"]
            .as_object()
            .map(|each| each.keys().cloned().collect())
    };
    let either: Vec<Value> = rule["matchAny"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|each| {
            let of = |index: usize| names(&each["matchFeatures"][index]).unwrap_or_else(Vec::new);
            json!({ "cpuId": of(0), "loadedKMod": of(1) })
        })
        .collect();
    same("what is matched", &json!(either), &older["matchOn"])
}

/// What is to be scraped is what the monitors' pods have, and the API server knows every field of theirs.
fn monitoring(server: &ApiServer) -> Result {
    // The manifest's story has deleted it.
    server.end_namespaces()?;
    let file = deploy("monitoring/daemonset.yaml").display().to_string();
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    server.apply(&namespace.to_string())?;
    let words = ["apply", "--dry-run=server", "--validate=strict", "--filename", &file];
    server.kubectl(words)?;
    let made = objects("daemonset.yaml", &read("monitoring/daemonset.yaml")?)?;
    let template = &made[&format!("DaemonSet {NAMESPACE}/sandpod-monitor")]["spec"]["template"];
    let labels = &template["metadata"]["labels"];
    let scraped = document("monitoring/podmonitor.yaml")?;
    same("the namespace", &scraped["metadata"]["namespace"], NAMESPACE)?;
    let policy = &made[&format!("NetworkPolicy {NAMESPACE}/sandpod-monitor")]["spec"];
    for selector in [&scraped["spec"]["selector"], &policy["podSelector"]] {
        same("the labels", &selector["matchLabels"], labels)?;
    }
    let port = &template["spec"]["containers"][0]["ports"][0]["name"];
    same("the port", &scraped["spec"]["podMetricsEndpoints"][0]["port"], port)?;
    same(
        "the port of the policy",
        &policy["ingress"][0]["ports"][0]["port"],
        port,
    )?;
    let image = format!("sandpod.io/installer:{}", env!("CARGO_PKG_VERSION"));
    same("the image", &template["spec"]["containers"][0]["image"], image.as_str())
}

/// Images, chart, bundle and subscription are of the version that is built.
fn versions(_: &ApiServer) -> Result {
    let version = env!("CARGO_PKG_VERSION");
    let image = |name: &str| json!(format!("sandpod.io/{name}:{version}"));
    let (chart, values) = (document("chart/Chart.yaml")?, document("chart/values.yaml")?);
    same("the chart's version", &chart["version"], version)?;
    same("the chart's appVersion", &chart["appVersion"], version)?;
    // Of what it makes both images, which are the manifest's.
    same("the chart's registry", &values["registry"], "sandpod.io")?;
    let service = service_version()?;
    let name = json!(format!("sandboxed-containers-operator.v{version}"));
    same("the service version's name", &service["metadata"]["name"], &name)?;
    same("the service version's version", &service["spec"]["version"], version)?;
    let related = json!([
        { "name": "operator", "image": image("operator") },
        { "name": "installer", "image": image("installer") },
    ]);
    same("its images", &service["spec"]["relatedImages"], &related)?;
    let subscription = objects("olm/install.yaml", &read("olm/install.yaml")?)?;
    let subscription = &subscription[&format!("Subscription {NAMESPACE}/{NAMESPACE}")]["spec"];
    same("the subscription's start", &subscription["startingCSV"], &name)
}

/// The catalog's last entry is the bundle.
fn catalog(_: &ApiServer) -> Result {
    let catalog = documents("catalog.yaml", &read("olm/catalog/catalog.yaml")?)?;
    let [package, channel, bundle] = catalog.as_slice() else {
        return Err(Failure::Claim(format!("the catalog has {} parts", catalog.len())));
    };
    let service = service_version()?;
    let (name, version) = (&service["metadata"]["name"], &service["spec"]["version"]);
    let entry = &channel["entries"][0];
    let range = &service["metadata"]["annotations"]["olm.skipRange"];
    same("the default channel", &package["defaultChannel"], &channel["name"])?;
    same("the channel's entry", &entry["name"], name)?;
    same("the range that it replaces", &entry["skipRange"], range)?;
    same("the bundle", &bundle["name"], name)?;
    let [of_package, _, of_service] = [0, 1, 2].map(|index| &bundle["properties"][index]["value"]);
    same("the bundle's version", &of_package["version"], version)?;
    let told = of_service.as_object().into_iter().flatten();
    for (field, value) in
        told.filter(|(field, _)| !["apiServiceDefinitions", "crdDescriptions"].contains(&field.as_str()))
    {
        same(field, &service["spec"][field], value)?;
    }
    let image = format!("sandpod.io/operator-bundle:{}", env!("CARGO_PKG_VERSION"));
    same("the bundle's image", &bundle["image"], image.as_str())?;
    let mut images = vec![json!({ "name": "bundle", "image": image })];
    images.extend(
        service["spec"]["relatedImages"]
            .as_array()
            .into_iter()
            .flatten()
            .cloned(),
    );
    same("the bundle's images", &bundle["relatedImages"], &json!(images))?;
    let subscription = objects("olm/install.yaml", &read("olm/install.yaml")?)?;
    let subscription = &subscription[&format!("Subscription {NAMESPACE}/{NAMESPACE}")]["spec"];
    same("the subscription's package", &subscription["name"], &package["name"])?;
    same("the subscription's channel", &subscription["channel"], &channel["name"])
}
