//! Installers that are killed or fail: what they have begun is undone, or done by the next one.

use std::{fs, path::Path, time::Duration};

use installer_report::{Code, Phase};
use tests::{
    failure::{Failure, Result, Trying, contains, same},
    node::Node,
};

use super::{DROP_IN, done, imports::without_the_line, play, sentence, shell, small};

/// At each line that it says, both on the way in and on the way out, where containerd's main file is edited, too.
pub fn killed_and_run_again(node: &Node) -> Result {
    play(node, |installer| {
        without_the_line(node, || {
            let payload = installer.payload("1.0.0", small)?;
            let install = [
                "install",
                "--payload",
                &payload,
                "--log-level",
                "debug",
                "--add-imports",
            ];
            let absent = installer.tree()?;
            installer.succeed(&install)?;
            let present = installer.tree()?;
            installer.succeed(&["uninstall"])?;
            for at in 0.. {
                let Some(line) = installer.kill_at(at, &install)? else {
                    break;
                };
                let at_line = |failure| Failure::Claim(format!("after a death at {line:?}: {failure}"));
                if at % 2 == 0 {
                    installer.succeed(&install).map_err(at_line)?;
                    installer.tree()?.same_as(&present).map_err(at_line)?;
                }
                installer.succeed(&["uninstall"]).map_err(at_line)?;
                installer.tree()?.same_as(&absent).map_err(at_line)?;
            }
            for at in 0.. {
                installer.succeed(&install)?;
                let line = installer.kill_at(at, &["uninstall"])?;
                let at_line = |failure| Failure::Claim(format!("after a death at {line:?}: {failure}"));
                installer.succeed(&["uninstall"]).map_err(at_line)?;
                installer.tree()?.same_as(&absent).map_err(at_line)?;
                if line.is_none() {
                    break;
                }
            }
            Ok(())
        })
    })
}

/// As above, at moments that nobody has chosen.
pub fn killed_at_any_moment(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let install = ["install", "--payload", &payload, "--log-level", "debug"];
        let absent = installer.tree()?;
        for round in 0..60 {
            let moment = Duration::from_millis(3 + round * 10);
            installer.kill_after(moment, &install)?;
            if round % 2 == 0 {
                installer.succeed(&install)?;
                installer.kill_after(moment, &["uninstall"])?;
            }
            installer.succeed(&["uninstall"])?;
            let at_moment = |failure| Failure::Claim(format!("after a death at {moment:?}: {failure}"));
            installer.tree()?.same_as(&absent).map_err(at_moment)?;
        }
        Ok(())
    })
}

/// A restart that does not happen, or fails: the node is as it was before, with or without an earlier version.
pub fn what_fails_is_undone(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        let before = installer.tree()?;
        let install = |more: &[&str]| installer.run(&[&["install", "--payload", &payload], more].concat());
        let absent = install(&["--restart-command", "true"])?;
        same("the phase", absent.phase, Phase::Failed)?;
        sentence(
            &absent,
            Code::HandlerAbsent,
            "containerd runs and does not list the handler `kata`",
        )?;
        installer.tree()?.same_as(&before)?;
        let failing = install(&["--restart-command", "false"])?;
        sentence(
            &failing,
            Code::RestartFailed,
            "`false` ended with exit status: 1; the log of containerd says more",
        )?;
        let silent = node.path("no-such-program").display().to_string();
        sentence(
            &install(&["--restart-command", &format!("sh {silent}")])?,
            Code::RestartFailed,
            &format!(
                "`sh {silent}` ended with exit status: 2 and said \"sh: 0: cannot open {silent}: No such file\"; "
            ),
        )?;
        installer.tree()?.same_as(&before)?;

        installer.succeed(&["install", "--payload", &payload])?;
        let installed = installer.tree()?;
        for arguments in [&["install", "--payload", &payload], &["uninstall"][..]] {
            let elsewhere = installer.run(&[arguments, &["--prefix", "/opt/else"]].concat())?;
            sentence(
                &elsewhere,
                Code::OtherPrefix,
                "Sandpod is installed in /opt/sandpod: uninstall it there first",
            )?;
        }
        fs::write(node.inside(DROP_IN), "# Sandpod: edited\n").trying("editing the drop-in")?;
        let verified = installer.run(&["verify"])?;
        sentence(
            &verified,
            Code::Damaged,
            "/etc/containerd/conf.d/50-kata.toml is not what was installed",
        )?;
        let repaired = installer.succeed(&["install", "--payload", &payload])?;
        done("a repair", &repaired, true, true)?;
        installer.tree()?.same_as(&installed)?;
        let broken = installer.payload("2.0.0", |path| small(path) || path == "virtiofsd")?;
        damage(Path::new(&broken))?;
        let refused = installer.run(&["install", "--payload", &broken])?;
        same("the phase", refused.phase, Phase::Refused)?;
        sentence(
            &refused,
            Code::Payload,
            "the payload is not usable: the contents of virtiofsd are not",
        )?;
        installer.tree()?.same_as(&installed)?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

/// Other bytes in a file of a payload; what has the same bytes under other names keeps them.
fn damage(payload: &Path) -> Result {
    let file = payload.join("virtiofsd");
    fs::remove_file(&file)
        .and_then(|()| fs::write(&file, "something else"))
        .trying("damaging a payload")
}

/// An uninstall needs neither the state nor a manifest to be whole.
pub fn damaged_goes_too(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        installer.succeed(&["install", "--payload", &payload, "--log-level", "debug"])?;
        let manifest = node.inside("/opt/sandpod/current/MANIFEST");
        fs::write(&manifest, "sandpod 1.0.0\nnonsense\n").trying("damaging the manifest")?;
        fs::write(node.inside("/opt/sandpod/state.json"), "{").trying("damaging the state")?;
        let refused = installer.run(&["install", "--payload", &payload])?;
        sentence(&refused, Code::ConfigInvalid, "/opt/sandpod/state.json is not valid: ")?;
        let gone = installer.succeed(&["uninstall"])?;
        let warnings = gone.warnings.join("\n");
        contains("the warnings", &warnings, "/opt/sandpod/state.json is damaged: ")?;
        contains(
            "the warnings",
            &warnings,
            "goes with all that is in it: its manifest has the line",
        )?;
        // Nobody remembers who has made the folders of others.
        shell(
            node,
            "rmdir /etc/containerd/conf.d; rmdir /etc/sandpod/config.d /etc/sandpod || :",
        )
    })
}
