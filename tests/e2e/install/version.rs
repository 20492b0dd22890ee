//! What an earlier release has left on the node: its files are taken over, and nothing of them stays behind.

use std::{fs, os::unix::fs::PermissionsExt};

use installer::files::sha256;
use installer_report::{Code, Phase};
use serde_json::json;
use tests::{
    failure::{Result, Trying, claim, contains, same},
    installer::Installer,
    node::Node,
};

use super::{DROP_IN, done, play, sentence, shell, small};

/// The drop-in of the releases that wrote one for all nodes.
const EARLIER_DROP_IN: &str = include_str!("earlier/50-kata.toml");
/// The version that it had installed, as its folder is named.
const EARLIER: &str = "0.0.9-0badcafe";
/// What it had written among the administrator's files.
const LOG_LEVEL: &str = "# Sandpod: pods that start from now on log everything; a later file may say otherwise.\n\
                         [runtime]\nenable_debug = true\n";

/// Upgrade to this version, back by one, and removal; with the state, locks and drop-in of before.
pub fn taken_over(node: &Node) -> Result {
    play(node, |installer| {
        let before = installer.tree()?;
        let payload = installer.payload("1.0.0", small)?;
        lay_out(node, installer)?;
        node.restart_containerd()?;
        let install = ["install", "--payload", &payload];
        let upgrade = installer.succeed(&install)?;
        same("the phase", upgrade.phase, Phase::Installed)?;
        // The main file has version 2, and so has the drop-in now.
        done("an upgrade", &upgrade, true, true)?;
        let drop_in = fs::read_to_string(node.inside(DROP_IN)).trying("reading the drop-in")?;
        contains("the drop-in", &drop_in, "\nversion = 2\n")?;
        for private in ["state.json", "current/.lock", &format!("versions/{EARLIER}/.lock")] {
            let path = node.inside(&format!("/opt/sandpod/{private}"));
            let mode = fs::metadata(&path)
                .trying(format!("looking at {private}"))?
                .permissions()
                .mode();
            same(&format!("the mode of {private}"), mode & 0o777, 0o600)?;
        }
        claim(
            !node.inside("/etc/sandpod/config.d/00-log-level.toml").exists(),
            "the log level of before should have gone with its file",
        )?;
        done("a second install", &installer.succeed(&install)?, false, false)?;
        back(node, installer)?;
        installer.succeed(&["uninstall"])?;
        installer.tree()?.same_as(&before)
    })
}

/// The version of before is a payload still, and the current one again.
fn back(node: &Node, installer: &Installer) -> Result {
    let older = installer.payload("0.9.0", small)?;
    let back = installer.succeed(&["install", "--payload", &older])?;
    done("a downgrade", &back, true, false)?;
    contains("the version", &back.version, "0.9.0-")?;
    same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;
    claim(
        !node.inside(&format!("/opt/sandpod/versions/{EARLIER}")).exists(),
        "the version before the one before should have gone",
    )?;
    let elsewhere = installer.run(&["install", "--payload", &older, "--prefix", "/opt/else"])?;
    sentence(&elsewhere, Code::OtherPrefix, "Sandpod is installed in /opt/sandpod: ")
}

/// Writes what the earlier release wrote: a version with its manifest and an open lock, the link to it, an open state,
/// the drop-in, and a log level.
fn lay_out(node: &Node, installer: &Installer) -> Result {
    let from = installer.payload("0.0.9", small)?;
    let version = format!("/opt/sandpod/versions/{EARLIER}");
    shell(
        node,
        &format!(
            "umask 022 && mkdir -p {version} /etc/containerd/conf.d && cp -r {from}/. {version}/ && : >{version}/.lock \
             && ln -s /etc/sandpod/config.d {version}/config.d && ln -s versions/{EARLIER} /opt/sandpod/current"
        ),
    )?;
    let log_level = "/etc/sandpod/config.d/00-log-level.toml";
    let mut made = vec!["/opt/sandpod", "/etc/containerd/conf.d"];
    if !node.inside("/etc/sandpod/config.d").exists() {
        made.extend(["/etc/sandpod", "/etc/sandpod/config.d"]);
    }
    let state = json!({
        "previous": null,
        "cri": "containerd",
        "made": made,
        "written": { log_level: sha256(LOG_LEVEL.as_bytes()) },
        "pending": null,
    });
    node.write(&node.inside(log_level), LOG_LEVEL)?;
    node.write(&node.inside("/opt/sandpod/state.json"), &format!("{state:#}\n"))?;
    node.write(&node.inside(DROP_IN), EARLIER_DROP_IN)
}
