//! The controller and the real installer, on hosts with a real containerd.

use serde_json::json;
use tests::failure::{Failure, Result, claim, contains, same};

use super::{
    Story,
    controller::Settings,
    ground::SOON,
    host::{self, Host, RESTART_COMMAND},
    kubelet::Image,
    rig::{NAME, Rig},
};

pub const STORIES: &[Story] = &[
    ("the_real_installer_on_two_hosts_and_a_new_version", two_hosts),
    ("the_real_installer_is_killed_at_every_step", killed),
    ("a_runtime_class_comes_with_its_settings_and_goes", runtime_class),
];

/// Workers with a containerd each, and a controller that knows the payload's version.
fn start(rig: &mut Rig<'_>, names: &[&str], retry_first: &'static str) -> Result<(Vec<Host>, Settings)> {
    let (payload, version) = host::payload(&rig.ground.path("payloads"), "0.1.0")?;
    let mut hosts = Vec::new();
    for name in names {
        let host = Host::start(&rig.ground.path(name))?;
        rig.register(name, &json!({}), true)?;
        let image = Image::real(&host.namespaces, payload.clone())?;
        rig.add_kubelet(name, host.root.clone(), image)?;
        hosts.push(host);
    }
    let settings = Settings {
        version,
        retry_first,
        restart_command: Some(RESTART_COMMAND),
        ..Settings::default()
    };
    rig.start_controller(&settings)?;
    Ok((hosts, settings))
}

fn runtime_class(rig: &mut Rig<'_>) -> Result {
    const FILE: &str = "etc/sandpod/runtime-classes/kata-large.toml";
    let (hosts, _) = start(rig, &["worker-0"], "1s")?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let classes = |rig: &Rig<'_>| -> Result<serde_json::Value> {
        Ok(rig.json(&["get", "kataconfig", NAME])?["status"]["runtimeClasses"].clone())
    };
    let settings = "[hypervisor.qemu]\ndefault_memory = 4096\n";
    let large = json!({"name": "kata-large", "configuration": settings, "overhead": {"memory": "1Gi"}});
    rig.respec(NAME, &json!({"runtimeClasses": [large]}))?;
    let status = |name| move |config: &serde_json::Value| config["status"]["runtimeClasses"] == name;
    let config = ["get", "kataconfig", NAME];
    rig.until_json(
        &config,
        "the class in the status",
        status(json!(["kata", "kata-large"])),
    )?;
    let text = std::fs::read_to_string(hosts[0].root.join(FILE)).map_err(|error| Failure::Claim(error.to_string()))?;
    contains("the class's file", &text, settings)?;
    let class = rig.json(&["get", "runtimeclass", "kata-large"])?;
    same("its handler", class["handler"].as_str(), Some("kata-large"))?;
    let overhead = json!({"podFixed": {"cpu": "500m", "memory": "1Gi"}});
    same("its overhead", class["overhead"].clone(), overhead)?;
    let drop_in = hosts[0].root.join("etc/containerd/conf.d/50-kata.toml");
    let handlers = || std::fs::read_to_string(&drop_in).map_err(|error| Failure::Claim(error.to_string()));
    contains("the drop-in", &handlers()?, "runtimes.kata-large.options]")?;

    // What no pod could start with is said before any node sees it.
    let wrong = json!({"name": "kata-large", "configuration": "[runtime]\nenable_debug = 1\n"});
    rig.respec(NAME, &json!({"runtimeClasses": [wrong]}))?;
    rig.history
        .until("the refusal", SOON, |row| row.condition[1] == "InvalidSpec")?;
    let refused = rig.respec(NAME, &json!({"runtimeClasses": [{"name": "runc"}]}));
    claim(refused.is_err(), "the API server should not take a class of this name")?;

    // Other people's RuntimeClasses are not the controller's, whatever its role says.
    let theirs = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "runc",
        "metadata": {"name": "theirs"}});
    rig.must(&["create", "-f", "-"], Some(&theirs.to_string()))?;
    let denied = rig.as_controller(&["delete", "runtimeclass", "theirs"], None)?;
    contains(
        "the refusal",
        &denied.errors(),
        "may change RuntimeClasses with the label",
    )?;
    rig.must(&["delete", "runtimeclass", "theirs"], None)?;

    rig.respec(NAME, &json!({"runtimeClasses": []}))?;
    rig.until_json(&config, "the class gone", status(json!(["kata"])))?;
    rig.until_installed(NAME, 1)?;
    claim(!hosts[0].root.join(FILE).exists(), "the class's file is still there")?;
    claim(!handlers()?.contains("kata-large"), "the drop-in still has the class")?;
    same("the classes", classes(rig)?, json!(["kata"]))?;
    let left = rig.kubectl(&["get", "runtimeclass", "kata-large"], None)?;
    contains("what is left", &left.errors(), "NotFound")
}

fn two_hosts(rig: &mut Rig<'_>) -> Result {
    let names = ["worker-0", "worker-1"];
    let (hosts, settings) = start(rig, &names, "1s")?;
    let before = hosts.iter().map(Host::files).collect::<Result<Vec<_>>>()?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 2)?;
    for (host, name) in hosts.iter().zip(names) {
        let current = std::fs::read_link(host.root.join("opt/sandpod/current"))
            .map_err(|error| Failure::Claim(error.to_string()))?;
        same(
            "the current version",
            current.display().to_string(),
            format!("versions/{}", settings.version),
        )?;
        let node = rig.json(&["get", "node", name])?;
        same(
            "its handlers",
            node["status"]["runtimeHandlers"].clone(),
            json!([{"name": "runc"}, {"name": "kata"}]),
        )?;
        same(
            "the version on the node",
            node["metadata"]["annotations"]["sandpod.io/installed-version"].as_str(),
            Some(settings.version.as_str()),
        )?;
    }
    // Somebody breaks a host; the next look finds that, and repairs it.
    std::fs::remove_file(hosts[0].root.join("etc/containerd/conf.d/50-kata.toml"))
        .map_err(|error| Failure::Claim(error.to_string()))?;
    rig.node_status("worker-0", &json!({"nodeInfo": {"kubeletVersion": "v1.36.4"}}))?;
    rig.history
        .until("the word of a repair", SOON, |row| row.condition[1] == "Updating")?;
    rig.until_installed(NAME, 2)?;
    claim(
        hosts[0].root.join("etc/containerd/conf.d/50-kata.toml").exists(),
        "the drop-in is not back",
    )?;

    rig.controller()?.stop()?;
    let (payload, version) = host::payload(&rig.ground.path("payloads"), "0.2.0")?;
    for index in 0..names.len() {
        rig.kubelet(index)?.carry(payload.clone());
    }
    let settings = Settings { version, ..settings };
    rig.start_controller(&settings)?;
    let has_it =
        |node: &serde_json::Value| node["metadata"]["annotations"]["sandpod.io/installed-version"] == settings.version;
    for name in names {
        rig.until_json(&["get", "node", name], "the new version on a node", has_it)?;
    }
    rig.until_installed(NAME, 2)?;
    rig.delete(NAME)?;
    rig.history.until_gone(NAME, SOON)?;
    for (host, before) in hosts.iter().zip(before) {
        same("the files of a host", host.files()?, before)?;
    }
    Ok(())
}

fn killed(rig: &mut Rig<'_>) -> Result {
    let (hosts, _) = start(rig, &["worker-0"], "50ms")?;
    let before = hosts[0].files()?;
    let die_at_every_step =
        |rig: &Rig<'_>, verb: &'static str| rig.kubelet(0).map(|kubelet| kubelet.die_at_every_step_of(verb));
    die_at_every_step(rig, "install")?;
    rig.create(NAME, &json!({}))?;
    rig.until_installed(NAME, 1)?;
    let deaths = rig.kubelet(0)?.deaths();
    claim(deaths.len() >= 8, format!("it was killed only at {deaths:#?}"))?;
    contains("the deaths", &deaths.join("\n"), "restarting containerd")?;
    die_at_every_step(rig, "uninstall")?;
    rig.delete(NAME)?;
    rig.history.until_gone(NAME, SOON)?;
    let deaths = rig.kubelet(0)?.deaths();
    claim(deaths.len() >= 4, format!("it was killed only at {deaths:#?}"))?;
    same("the files of the host", hosts[0].files()?, before)
}
