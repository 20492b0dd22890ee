//! A node whose kubelet's containerd is a distribution's, with another one beside it.

use std::{
    fs,
    process::{Child, Stdio},
};

use installer_report::{Code, Phase};
use tests::{
    config::{self, Site},
    failure::{Result, Trying, claim, contains, same},
    installer,
    node::Node,
    run,
};

use super::{HANDLER, done, play, sentence, shell, small};

/// The drop-in of a k3s with containerd 2.
const DROP_IN: &str = "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/50-kata.toml";

/// Another containerd at the place of packages, such as Docker's.
struct Another<'n> {
    node: &'n Node,
    daemon: Child,
}

impl<'n> Another<'n> {
    fn start(node: &'n Node) -> Result<Self> {
        let main = node.inside(Site::Packages.main());
        let text = config::containerd(&node.path("docker"), Site::Packages, &[]);
        node.write(&main, &format!("imports = [\"/etc/containerd/conf.d/*.toml\"]\n{text}"))?;
        let mut command = node.command("containerd");
        command
            .args(["--config", Site::Packages.main()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let another = Self {
            node,
            daemon: command.spawn().trying("starting another containerd")?,
        };
        let mut serves = || {
            another
                .ask(&["version"])
                .map(drop)
                .map_err(|failure| failure.to_string())
        };
        node.events()
            .bell
            .until("an answer of another containerd", run::ORDINARY, &mut serves)?;
        Ok(another)
    }

    /// What the CRI's client says of it.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let endpoint = format!("unix://{}", Site::Packages.socket());
        let options = ["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint];
        let words = options.into_iter().chain(words.iter().copied());
        self.node.crictl(words).map(|output| output.text())
    }

    fn end(self) -> Result {
        installer::end(&self.daemon)?;
        run::wait(self.daemon, run::ORDINARY, "another containerd")?;
        shell(self.node, "rm -r /etc/containerd/config.toml /run/containerd")?;
        fs::remove_dir_all(self.node.path("docker")).trying("removing another containerd's folder")
    }
}

/// The handler is where the kubelet looks, pods run, and the other containerd is neither configured nor restarted.
pub fn k3s(node: &Node) -> Result {
    let another = Another::start(node)?;
    let before = another.ask(&["info"])?;
    let told = play(node, |installer| {
        installer.script(&["--cri", "containerd"])?;
        same("restarts", installer.restarts(), 1)?;
        let drop_in = fs::read_to_string(node.inside(DROP_IN)).trying("reading the drop-in")?;
        contains("the drop-in", &drop_in, "version = 3\n")?;
        claim(
            !node.inside("/etc/containerd/conf.d").exists(),
            "the other containerd should have no drop-in",
        )?;
        same("what the other containerd is", another.ask(&["info"])?, before)?;
        let pod = node.pod_with_handler(HANDLER, "first").run()?;
        let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
        same("an exec", container.shell("echo here")?.as_str(), "here")?;
        pod.remove()?;

        let payload = installer.payload("1.0.0", small)?;
        let upgrade = installer.succeed(&["install", "--payload", &payload])?;
        done("an upgrade", &upgrade, true, false)?;
        contains("the CRI", &upgrade.facts.cri, "k3s's containerd 2.")?;
        same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;
        installer.script(&["--uninstall"])?;
        same("restarts", installer.restarts(), 2)?;
        unread(node, installer)
    });
    another.end()?;
    told
}

/// A k3s whose configuration does not import the folder is told of, with the cure that its administrator has.
fn unread(node: &Node, installer: &installer::Installer) -> Result {
    let main = node.inside(node.site().main());
    let text = fs::read_to_string(&main).trying("reading containerd's configuration")?;
    let lines = text.lines().skip(1).map(|line| format!("{line}\n"));
    fs::write(&main, lines.collect::<String>()).trying("writing containerd's configuration")?;
    let payload = installer.payload("1.0.0", small)?;
    let refused = installer.run(&["install", "--payload", &payload, "--add-imports"])?;
    fs::write(&main, text).trying("writing containerd's configuration back")?;
    sentence(
        &refused,
        Code::DropInNotRead,
        "k3s's containerd does not read /var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d: \
         /var/lib/rancher/k3s/agent/etc/containerd/config.toml has no `imports = ",
    )?;
    same("the phase", refused.phase, Phase::Refused)
}
