//! Main files of each version, with the line that imports our folder and without it.

use std::fs;

use installer_report::{Code, Phase};
use tests::{
    failure::{Result, Trying, claim, contains, same},
    installer::Installer,
    node::Node,
};

use super::{
    MAIN,
    containerd::{Effective, compared},
    done, play, sentence, small,
};

/// Plays with a main file of another text, which containerd has read.
fn with_main(node: &Node, text: &str, tell: impl FnOnce() -> Result) -> Result {
    let main = node.inside(MAIN);
    let before = fs::read_to_string(&main).trying("reading containerd's configuration")?;
    fs::write(&main, text)
        .trying("writing containerd's configuration")
        .and_then(|()| node.restart_containerd())?;
    let told = tell();
    fs::write(&main, before).trying("writing containerd's configuration back")?;
    told.and(node.restart_containerd())
}

/// Plays with the usual main file, but for its first line, which imports the drop-ins.
pub fn without_the_line(node: &Node, tell: impl FnOnce() -> Result) -> Result {
    with_main(node, &lineless(&node.bare_configuration(2)), tell)
}

fn lineless(text: &str) -> String {
    text.lines().skip(1).map(|line| format!("{line}\n")).collect()
}

/// containerd 2.0 to 2.2 know no later one.
pub fn version_3(node: &Node) -> Result {
    each_version(node, &[3])
}

/// Of containerd 2.3 and later.
pub fn versions_3_and_4(node: &Node) -> Result {
    each_version(node, &[3, 4])
}

/// What the node's own file says is read with the handler as without it, and verified.
fn each_version(node: &Node, versions: &[u32]) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", small)?;
        for version in versions {
            let with = node.bare_configuration(*version);
            for (text, more) in [(&with, &[][..]), (&lineless(&with), &["--add-imports"][..])] {
                let install = [&["install", "--payload", &payload], more].concat();
                with_main(node, text, || stays(node, installer, &install))?;
            }
        }
        Ok(())
    })
}

fn stays(node: &Node, installer: &Installer, install: &[&str]) -> Result {
    let (tree, effective) = (installer.tree()?, Effective::of(node)?);
    let report = installer.succeed(install)?;
    claim(
        compared(&report),
        "the installer should have compared the configuration",
    )?;
    same("containerd's configuration", Effective::of(node)?, effective)?;
    same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;
    done("a second install", &installer.succeed(install)?, false, false)?;
    installer.succeed(&["uninstall"])?;
    installer.tree()?.same_as(&tree)
}

/// Nobody's file is edited who has not asked for it. An edit of his own that comes later stays.
pub fn added_and_taken_out(node: &Node) -> Result {
    const OWN: &str = "# How this node runs.\n";
    const LINE: &str = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n";
    let text = format!("{OWN}{}", lineless(&node.bare_configuration(2)));
    play(node, |installer| {
        with_main(node, &text, || {
            let payload = installer.payload("1.0.0", small)?;
            let install = ["install", "--payload", &payload];
            sentence(
                &installer.run(&install)?,
                Code::DropInNotRead,
                "containerd does not read /etc/containerd/conf.d: add `imports = ",
            )?;
            let asked = [&install[..], &["--add-imports"]].concat();
            undone(installer, &asked)?;
            done("a first install", &installer.succeed(&asked)?, true, true)?;
            let main = node.inside(MAIN);
            let edited = fs::read_to_string(&main).trying("reading containerd's configuration")?;
            claim(
                edited.starts_with(OWN),
                "the administrator's own words should be the first",
            )?;
            same("the file without the line", edited.replace(LINE, ""), text.clone())?;
            done(
                "an install that need not ask",
                &installer.succeed(&install)?,
                false,
                false,
            )?;

            fs::write(&main, format!("{edited}# Mine.\n")).trying("editing containerd's configuration")?;
            let gone = installer.succeed(&["uninstall"])?;
            contains(
                "the warnings",
                &gone.warnings.join("\n"),
                "/etc/containerd/config.toml was edited since its import was added",
            )?;
            let left = fs::read_to_string(&main).trying("reading containerd's configuration")?;
            same("what is left", left, format!("{text}# Mine.\n"))?;
            fs::write(&main, &text).trying("taking the edit back")
        })
    })
}

/// An install that fails takes the line out again.
fn undone(installer: &Installer, install: &[&str]) -> Result {
    let before = installer.tree()?;
    let failed = installer.run(&[install, &["--restart-command", "false"]].concat())?;
    same("the phase", failed.phase, Phase::Failed)?;
    installer.tree()?.same_as(&before)
}
