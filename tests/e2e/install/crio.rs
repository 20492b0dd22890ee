//! A node whose CRI is a CRI-O that does not list its handlers, as before 1.30: a stand-in, since no pod is started.

use std::fs;

use installer_report::{Code, Phase};
use tests::{
    failure::{Result, Trying, claim, contains, same},
    installer::Installer,
    node::Node,
    places, run,
};

use super::{done, play, sentence, small};

/// The stand-in on a node; it is ended in [`with_crio`].
struct Crio<'n> {
    node: &'n Node,
    program: String,
}

impl Crio<'_> {
    fn tell(&self, verb: &str) -> Result {
        let mut command = self.node.command(&self.program);
        run::succeed(command.arg(verb), run::ORDINARY).map(drop)
    }

    /// Changes what it is like from its next start on.
    fn is(&self, what: &str, so: bool) -> Result {
        let file = self.node.inside("/run/crio").join(what);
        match so {
            true => fs::write(&file, ""),
            false => fs::remove_file(&file),
        }
        .trying(format!("making CRI-O {what}: {so}"))
    }
}

/// Plays with an installer and a CRI-O, which the installer restarts by the words that the play gets.
fn with_crio(node: &Node, tell: impl FnOnce(&Installer, &Crio, &[&str]) -> Result) -> Result {
    let crio = Crio {
        node,
        program: places::binaries()?.join("stand-in-crio").display().to_string(),
    };
    crio.tell("restart")?;
    let restart = format!("{} restart", crio.program);
    let told = play(node, |installer| {
        let words = ["--cri", "crio", "--restart-command", &restart];
        tell(installer, &crio, &words)?;
        same("restarts of containerd", installer.restarts(), 0)
    });
    crio.tell("stop")?;
    told.and(fs::remove_dir_all(node.inside("/run/crio")).trying("removing CRI-O's folder"))
}

/// What its configuration in force says proves the handlers, those of RuntimeClasses too.
pub fn proves_by_its_configuration(node: &Node) -> Result {
    with_crio(node, |installer, crio, words| {
        let payload = installer.payload("1.0.0", small)?;
        let class = [
            "--runtime-class",
            "kata-large=[hypervisor.qemu]\ndefault_memory = 4096\n",
        ];
        let install = [&["install", "--payload", &payload], words, &class].concat();
        let first = installer.succeed(&install)?;
        done("a first install", &first, true, true)?;
        same("the handlers were seen", first.handler_seen, Some(true))?;
        contains("the CRI", &first.facts.cri, "CRI-O 1.28")?;
        let untold = first.warnings.iter().any(|warning| warning.contains("does not tell"));
        claim(!untold, format!("nothing is left open: {:?}", first.warnings))?;
        let again = installer.succeed(&install)?;
        done("a second install", &again, false, false)?;
        same("the handlers were seen", again.handler_seen, Some(true))?;
        let verified = installer.succeed(&["verify"])?;
        same("the handlers were seen", verified.handler_seen, Some(true))?;
        // It was restarted by somebody else and has lost them.
        crio.is("blind", true)?;
        crio.tell("restart")?;
        let verified = installer.run(&["verify"])?;
        sentence(
            &verified,
            Code::HandlerAbsent,
            "CRI-O runs and has left out the handler `kata`, ",
        )?;
        same("the handlers were seen", verified.handler_seen, Some(false))?;
        crio.is("blind", false)?;
        let repaired = installer.succeed(&install)?;
        same("restarted", repaired.restarted, true)?;
        same("the handlers were seen", repaired.handler_seen, Some(true))?;
        let gone = installer.succeed(&[&["uninstall"], words].concat())?;
        same("the handlers were seen", gone.handler_seen, Some(false))
    })
}

/// One that goes on without our handler fails the install, which is undone.
pub fn a_handler_that_is_left_out_fails(node: &Node) -> Result {
    with_crio(node, |installer, crio, words| {
        let payload = installer.payload("1.0.0", small)?;
        let before = installer.tree()?;
        crio.is("blind", true)?;
        let failed = installer.run(&[&["install", "--payload", &payload], words].concat())?;
        same("the phase", failed.phase, Phase::Failed)?;
        done("a failure", &failed, false, true)?;
        same("the handlers were seen", failed.handler_seen, Some(false))?;
        sentence(
            &failed,
            Code::HandlerAbsent,
            "CRI-O runs and has left out the handler `kata`, as it does with one whose program it does not find",
        )?;
        installer.tree()?.same_as(&before)
    })
}

/// One that tells nothing at all is believed, with a warning.
pub fn one_that_tells_nothing_is_believed(node: &Node) -> Result {
    with_crio(node, |installer, crio, words| {
        let payload = installer.payload("1.0.0", small)?;
        crio.is("mute", true)?;
        let report = installer.succeed(&[&["install", "--payload", &payload], words].concat())?;
        same("the handlers were seen", report.handler_seen, None)?;
        contains(
            "the warnings",
            &report.warnings.join("\n"),
            "CRI-O 1.28.4 does not tell its handlers; that it has `kata` shows when a pod asks for it",
        )?;
        same(
            "the handlers were seen",
            installer.succeed(&["verify"])?.handler_seen,
            None,
        )?;
        installer.succeed(&[&["uninstall"], words].concat()).map(drop)
    })
}
