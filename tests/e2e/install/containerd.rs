//! What a node's administrator has told containerd: it stays in force.

use std::fs;

use installer_report::{Code, Phase, Report};
use serde_json::Value;
use tests::{
    failure::{Result, Trying, claim, same},
    images,
    installer::Installer,
    node::Node,
    run,
};

use super::{DROP_IN, HANDLER, MAIN, done, play, sentence, small};

/// Plays on a node whose administrator has a cgroup driver and a runtime of his own, and whose containerd runs with them.
fn play_with_own_configuration(node: &Node, tell: impl FnOnce(&Installer) -> Result) -> Result {
    const EXTRA: &str = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.extra]\n\
                         runtime_type = \"io.containerd.runc.v2\"\n";
    play(node, |installer| {
        let main = node.inside(MAIN);
        let before = fs::read_to_string(&main).trying("reading containerd's configuration")?;
        let own = before.replace("SystemdCgroup = false", "SystemdCgroup = true") + EXTRA;
        fs::write(&main, own)
            .trying("writing containerd's configuration")
            .and_then(|()| node.restart_containerd())?;
        let told = tell(installer);
        fs::write(&main, before).trying("writing containerd's configuration back")?;
        told.and(node.restart_containerd())
    })
}

/// What containerd makes of its configuration, without the handler: as the CRI tells it, and as its program prints it.
#[derive(Debug, PartialEq)]
pub struct Effective {
    told: Value,
    printed: Vec<String>,
}

impl Effective {
    pub fn of(node: &Node) -> Result<Effective> {
        let info = node.crictl(["info", "--output", "json"])?.text();
        let info: Value = serde_json::from_str(&info).trying("reading what the CRI tells of itself")?;
        let mut told = info["config"].clone();
        if let Some(runtimes) = told.pointer_mut("/containerd/runtimes").and_then(Value::as_object_mut) {
            runtimes.remove(HANDLER);
        }
        let mut command = node.command("containerd");
        let dump = run::succeed(command.args(["--config", MAIN, "config", "dump"]), run::ORDINARY)?.text();
        let mut ours = false;
        let printed = dump.lines().filter(|line| {
            let line = line.trim();
            if line.starts_with('[') {
                ours = line.starts_with(&format!("[{OURS}"));
            }
            // Which files are read is no part of what they say.
            !ours && !line.is_empty() && !line.starts_with("imports = ")
        });
        Ok(Effective {
            told,
            printed: printed.map(str::to_owned).collect(),
        })
    }

    /// Fails unless it has what the administrator of [`play_with_own_configuration`] has asked for.
    fn is_the_administrators(&self) -> Result {
        let runtimes = &self.told["containerd"]["runtimes"];
        same(
            "the extra runtime",
            runtimes["extra"]["runtimeType"].as_str(),
            Some("io.containerd.runc.v2"),
        )?;
        let cgroup = runtimes["runc"]["options"]["SystemdCgroup"].as_bool();
        same("the cgroup driver", cgroup, Some(true))?;
        let pause = |line: &String| line.contains(&format!("sandbox = '{}'", images::PAUSE));
        claim(
            self.printed.iter().any(pause),
            "the pause image should be the administrator's",
        )
    }
}

/// The section of our handler in what containerd 2 prints.
const OURS: &str = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata";

/// The pause image, the cgroup driver and other runtimes are read with the handler as without it.
pub fn own_configuration_stays(node: &Node) -> Result {
    play_with_own_configuration(node, |installer| {
        let before = Effective::of(node)?;
        before.is_the_administrators()?;
        let payload = installer.payload("1.0.0", small)?;
        let report = installer.succeed(&["install", "--payload", &payload])?;
        claim(
            compared(&report),
            "the installer should have compared the configuration",
        )?;
        same("containerd's configuration", Effective::of(node)?, before)?;
        same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

/// A restart that brings more than the handler is undone. Nothing tells that the rest is the administrator's own edit;
/// he is told what has changed, and the next install finds it in force.
pub fn edit_is_told(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload];
        let main = node.inside(MAIN);
        let text = fs::read_to_string(&main).trying("reading containerd's configuration")?;
        let edited = text.replace("SystemdCgroup = false", "SystemdCgroup = true");
        fs::write(&main, edited).trying("editing containerd's configuration")?;
        let before = installer.tree()?;
        let failed = installer.run(&install)?;
        same("the phase", failed.phase, Phase::Failed)?;
        sentence(
            &failed,
            Code::ConfigInvalid,
            "containerd had not the same `containerd.runtimes.runc.options.SystemdCgroup` after its restart as before: ",
        )?;
        done("what was undone", &failed, false, true)?;
        installer.tree()?.same_as(&before)?;
        installer.succeed(&install)?;
        installer.succeed(&["uninstall"])?;
        fs::write(&main, text).trying("writing containerd's configuration back")?;
        node.restart_containerd()
    })
}

/// Whether the installer has compared what containerd made of its configuration before and after its restart.
pub fn compared(report: &Report) -> bool {
    !report
        .warnings
        .iter()
        .any(|warning| warning.contains("was not compared"))
}

/// A Sandpod that wrote the same drop-in for all nodes has made containerd ignore what the node's own file says.
pub fn drop_in_put_right(node: &Node) -> Result {
    const OF_VERSION_3: &str = include_str!("../../../deploy/cri/50-kata.containerd-2.toml");
    play_with_own_configuration(node, |installer| {
        let before = Effective::of(node)?;
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload];
        installer.succeed(&install)?;
        let installed = installer.tree()?;
        fs::write(node.inside(DROP_IN), OF_VERSION_3).trying("writing another drop-in")?;
        node.restart_containerd()?;
        let ignored = Effective::of(node)?.is_the_administrators();
        claim(ignored.is_err(), "containerd should ignore its main file by now")?;
        sentence(
            &installer.run(&["verify"])?,
            Code::Damaged,
            "/etc/containerd/conf.d/50-kata.toml has not the `version` of the configuration that imports it",
        )?;
        let repaired = installer.succeed(&install)?;
        done("a repair", &repaired, true, true)?;
        claim(
            !compared(&repaired),
            "a configuration that was not read cannot be compared",
        )?;
        installer.tree()?.same_as(&installed)?;
        same("containerd's configuration", Effective::of(node)?, before)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}
