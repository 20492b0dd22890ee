//! A node whose containerd is a unit of a distribution's, with its files elsewhere, beside the one of packages.
//!
//! A [`Layout`] is all that a distribution's containerd has of its own. What is told of each is the same. A pod, which
//! takes long on an emulated node, runs under one of them: what the others' CRI says of the handler is the same.

use serde_json::Value;
use tests::{
    failure::{Failure, Result, claim, contains, same},
    images,
    machine::Machine,
    places,
};

use crate::{
    Story,
    install::{HANDLER, INSTALL, installer, payload, pods_are_gone, script, uninstall},
};

pub const STORIES: &[Story] = &[
    ("k3s_is_served_from_install_to_removal_without_a_boot", |node| {
        play(node, &rancher("k3s", "k3s", Proof::Upgrade))
    }),
    ("rke2_is_served_from_install_to_removal_without_a_boot", |node| {
        play(node, &rancher("rke2", "rke2-agent", Proof::Settings))
    }),
    ("k0s_is_served_from_install_to_removal_without_a_boot", |node| {
        play(node, &k0s())
    }),
    ("microk8s_is_served_from_install_to_removal_without_a_boot", |node| {
        play(node, &microk8s())
    }),
];

/// What shows that a handler is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// What the CRI says of it. Nothing that pods need is installed.
    Settings,
    /// A pod that outlives an upgrade and a downgrade, too.
    Upgrade,
}

/// How a distribution lays out its containerd.
#[derive(Debug)]
struct Layout {
    /// The unit of systemd that starts it.
    unit: &'static str,
    /// The socket of its CRI.
    socket: &'static str,
    /// What it is started with.
    arguments: String,
    /// A shell script that makes what the distribution brings.
    brings: &'static str,
    /// A shell script that the unit runs at each start, before containerd: it writes containerd's configuration.
    writes: String,
    /// What the distribution, or its administrator, says in containerd's configuration.
    main: String,
    /// The drop-in of our handler.
    drop_in: String,
    /// How the installer is called, besides.
    options: &'static str,
    /// The folders of the distribution.
    folders: &'static str,
    proof: Proof,
}

/// k3s, and RKE2, which is the same below another folder: the main file is written at each start, and imports a folder
/// beside it.
fn rancher(name: &str, unit: &'static str, proof: Proof) -> Layout {
    let agent = format!("/var/lib/rancher/{name}/agent");
    let folder = format!("{agent}/etc/containerd");
    Layout {
        unit,
        socket: "/run/k3s/containerd/containerd.sock",
        arguments: format!("-c {folder}/config.toml"),
        brings: "",
        writes: format!(
            "mkdir -p {folder}
             {{ echo 'root = \"{agent}/containerd\"'
               echo 'state = \"/run/k3s/containerd\"'
               sed 's|/etc/containerd/conf.d|{folder}/config-v3.toml.d|' /etc/containerd/config.toml
               echo '[grpc]'
               echo 'address = \"/run/k3s/containerd/containerd.sock\"'
             }} >{folder}/config.toml"
        ),
        main: format!("{folder}/config.toml"),
        drop_in: format!("{folder}/config-v3.toml.d/50-kata.toml"),
        options: "",
        folders: "/var/lib/rancher /run/k3s",
        proof,
    }
}

/// The main file, which has a mark as long as k0s writes it, imports one that k0s makes of its own configuration of the
/// CRI and of the drop-ins.
fn k0s() -> Layout {
    const WRITES: &str = r#"mkdir -p /etc/k0s/containerd.d /run/k0s
{ grep -v '^imports' /etc/containerd/config.toml
  find /etc/k0s/containerd.d -name '*.toml' -exec grep -hv '^version' {} +
} >/run/k0s/containerd-cri.toml
{ echo '# k0s_managed=true'
  echo 'version = 3'
  echo 'imports = ["/run/k0s/containerd-cri.toml"]'
} >/etc/k0s/containerd.toml"#;
    Layout {
        unit: "k0sworker",
        socket: "/run/k0s/containerd.sock",
        arguments: "--root=/var/lib/k0s/containerd --state=/run/k0s/containerd --address=/run/k0s/containerd.sock \
                    --config=/etc/k0s/containerd.toml"
            .to_owned(),
        brings: "",
        writes: WRITES.to_owned(),
        main: "/etc/k0s/containerd.toml".to_owned(),
        drop_in: "/etc/k0s/containerd.d/50-kata.toml".to_owned(),
        options: "",
        folders: "/etc/k0s /var/lib/k0s /run/k0s",
        proof: Proof::Settings,
    }
}

/// The file that containerd reads is made of a template, which is its administrator's, and which imports nothing: a
/// line is added for who asks.
fn microk8s() -> Layout {
    const BRINGS: &str = r#"data=/var/snap/microk8s/8000
mkdir -p $data/args/cni-network /var/snap/microk8s/common/run
ln -s 8000 /var/snap/microk8s/current
cp /etc/cni/net.d/* $data/args/cni-network
grep -v '^imports' /etc/containerd/config.toml |
  sed 's|/etc/cni/net.d|${SNAP_DATA}/args/cni-network|' >$data/args/containerd-template.toml"#;
    const WRITES: &str = r#"data=/var/snap/microk8s/8000
sed "s|\${SNAP_DATA}|$data|g" $data/args/containerd-template.toml >$data/args/containerd.toml"#;
    Layout {
        unit: "snap.microk8s.daemon-containerd",
        socket: "/var/snap/microk8s/common/run/containerd.sock",
        arguments: "--config /var/snap/microk8s/8000/args/containerd.toml \
                    --root /var/snap/microk8s/common/var/lib/containerd \
                    --state /var/snap/microk8s/common/run/containerd \
                    --address /var/snap/microk8s/common/run/containerd.sock"
            .to_owned(),
        brings: BRINGS,
        writes: WRITES.to_owned(),
        main: "/var/snap/microk8s/current/args/containerd-template.toml".to_owned(),
        drop_in: "/var/snap/microk8s/common/containerd/conf.d/50-kata.toml".to_owned(),
        options: "--add-imports",
        folders: "/var/snap/microk8s",
        proof: Proof::Settings,
    }
}

impl Layout {
    /// Makes all of it, starts it, and has the CRI's client ask it.
    fn furnish(&self, node: &Machine) -> Result {
        let Layout { unit, socket, .. } = self;
        node.put("/run/layout", format!("set -e\n{}\n", self.writes).as_bytes())?;
        node.run(&format!(
            "set -e
             {brings}
             mkdir -p /run/systemd/system
             cat >/run/systemd/system/{unit}.service <<END
[Service]
Type=notify
ExecStartPre=/bin/sh /run/layout
ExecStart=/usr/local/bin/containerd {arguments}
Delegate=yes
KillMode=process
END
             sed 's|/run/containerd/containerd.sock|{socket}|' /etc/crictl.yaml >/run/crictl.yaml
             mount --bind /run/crictl.yaml /etc/crictl.yaml
             systemctl daemon-reload
             systemctl start {unit}",
            brings = self.brings,
            arguments = self.arguments,
        ))
        .map(drop)
    }

    /// Takes all of it away.
    fn unfurnish(&self, node: &Machine) -> Result {
        node.run(&format!(
            "umount /etc/crictl.yaml; systemctl stop {unit}; rm -r /run/systemd/system/{unit}.service /run/layout \
             /run/crictl.yaml {folders}; systemctl daemon-reload",
            unit = self.unit,
            folders = self.folders,
        ))
        .map(drop)
    }

    /// Installs what the proof needs.
    fn install(&self, node: &Machine) -> Result {
        match self.proof {
            Proof::Settings => {
                let command = format!("{} {}", installer(&small(node)?)?, self.options);
                node.run_within(&command, INSTALL)
            }
            Proof::Upgrade => script(node, self.options),
        }
        .map(drop)
    }
}

/// A payload without what only pods need: it is read, hashed and written in a moment.
fn small(node: &Machine) -> Result<String> {
    const FOLDER: &str = "/run/payloads/small";
    node.run(&format!(
        "set -e; from={from} to={FOLDER}; mkdir -p $to
         {{ head -n 1 $from/MANIFEST
           grep -E ' (bin/containerd-shim-kata-v2|configuration.toml|share/doc/.*)$' $from/MANIFEST
         }} >$to/MANIFEST
         tail -n +2 $to/MANIFEST | while read -r _ _ _ path; do
           mkdir -p \"$(dirname \"$to/$path\")\" && cp \"$from/$path\" \"$to/$path\"
         done",
        from = places::payload()?.display(),
    ))?;
    Ok(FOLDER.to_owned())
}

/// What systemd runs as a service now.
fn main_process(node: &Machine, unit: &str) -> Result<String> {
    node.run(&format!("systemctl show --property MainPID --value {unit}"))
}

fn play(node: &Machine, layout: &Layout) -> Result {
    if node.try_run("test -e /opt/sandpod/current")?.code == 0 {
        uninstall(node)?;
    }
    let told = layout.furnish(node).and_then(|()| served(node, layout));
    let gone = layout.unfurnish(node);
    told.and(gone)
}

/// From install to removal: the distribution's own service is restarted twice, and no other one.
fn served(node: &Machine, layout: &Layout) -> Result {
    let Layout {
        unit, main, drop_in, ..
    } = layout;
    let boot = || node.run("cat /proc/sys/kernel/random/boot_id");
    let configured = || node.run(&format!("cat {main}"));
    let (booted, before) = (boot()?, configured()?);
    let (other, first) = (main_process(node, "containerd")?, main_process(node, unit)?);
    layout.install(node)?;
    let installed = main_process(node, unit)?;
    claim(first != installed, format!("an install should have restarted {unit}"))?;
    contains("the drop-in", &node.run(&format!("cat {drop_in}"))?, "version = 3")?;
    same(
        "drop-ins of the other containerd",
        node.run("ls /etc/containerd/conf.d")?.as_str(),
        "",
    )?;
    settings(node)?;
    match layout.proof {
        Proof::Settings => {}
        Proof::Upgrade => outlives_changes(node, layout)?,
    }
    same("the process of the unit", main_process(node, unit)?, installed.clone())?;

    script(node, "--uninstall")?;
    claim(
        main_process(node, unit)? != installed,
        format!("a removal should have restarted {unit}"),
    )?;
    claim(!serves(&info(node)?), "the CRI should not have the handler any more")?;
    same("the other containerd", main_process(node, "containerd")?, other)?;
    node.run(&format!("! [ -e {drop_in} ] && ! [ -e /opt/sandpod ]"))?;
    same(main, configured()?, before)?;
    same("the boot", boot()?, booted)
}

/// What the CRI says of itself.
fn info(node: &Machine) -> Result<Value> {
    let told = node.crictl(&["info"])?;
    serde_json::from_str(&told).map_err(|source| Failure::Json {
        what: "what the CRI says of itself".to_owned(),
        source,
    })
}

/// Whether the CRI lists our handler.
fn serves(info: &Value) -> bool {
    let handlers = info["runtimeHandlers"].as_array();
    handlers.is_some_and(|all| all.iter().any(|handler| handler["name"] == HANDLER))
}

/// The CRI lists our handler, and has it as the drop-in says; it has runc still, and the network.
fn settings(node: &Machine) -> Result {
    let info = info(node)?;
    claim(
        serves(&info),
        format!("the CRI should list the handler {HANDLER}: {info}"),
    )?;
    let runtimes = &info["config"]["containerd"]["runtimes"];
    let ours = &runtimes[HANDLER];
    same("the handler's type", &ours["runtimeType"], "io.containerd.kata.v2")?;
    same(
        "the handler's program",
        &ours["runtimePath"],
        "/opt/sandpod/current/bin/containerd-shim-kata-v2",
    )?;
    same(
        "what a privileged container gets",
        &ours["privileged_without_host_devices"],
        &Value::Bool(true),
    )?;
    same(
        "the type of the handler of before",
        &runtimes["runc"]["runtimeType"],
        "io.containerd.runc.v2",
    )?;
    let conditions = info["status"]["conditions"].as_array();
    let holds = |condition: &Value| condition["type"] == "NetworkReady" && condition["status"] == true;
    claim(
        conditions.is_some_and(|all| all.iter().any(holds)),
        format!("the network should be ready: {info}"),
    )
}

/// A pod runs, and goes on under an upgrade and a downgrade.
fn outlives_changes(node: &Machine, layout: &Layout) -> Result {
    node.run(&format!(
        "ctr --address {} -n k8s.io images import {}",
        layout.socket,
        images::archive()?.display()
    ))?;
    let pod = node.pod(HANDLER, "old").run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"])?;
    up_and_down(node)?;
    contains("an exec", &container.shell("echo here")?, "here")?;
    pod.remove()?;
    pods_are_gone(node)
}

/// Another version, and the one of before again.
fn up_and_down(node: &Machine) -> Result {
    let current = || node.run("readlink /opt/sandpod/current");
    node.run_within(&installer(&payload(node, "2.0.0")?)?, INSTALL)?;
    contains("the current version", &current()?, "2.0.0-")?;
    script(node, "")?;
    let back = current()?;
    claim(!back.contains("2.0.0-"), format!("{back} is not the version of before"))
}
