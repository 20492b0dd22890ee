//! A RuntimeClass with settings of its own: another handler, and a file that is laid over the node's configuration.

use std::fs;

use installer_report::{Code, Phase};
use tests::{
    failure::{Result, Trying, claim, contains, same},
    node::Node,
};

use super::{HANDLER, MAIN, done, play, sentence};

const LARGE: &str = "kata-large";
/// Its file.
const FILE: &str = "/etc/sandpod/runtime-classes/kata-large.toml";

/// What the command line says of it.
fn word(parameter: &str) -> String {
    format!("{LARGE}=[hypervisor.qemu]\nkernel_params = \"{parameter}\"\n")
}

/// The kernel's command line in a new pod of this handler.
fn command_line(node: &Node, handler: &str, name: &str) -> Result<String> {
    let pod = node.pod_with_handler(handler, name).run()?;
    let container = pod.container("sleeper", &["sleep", "infinity"]).run()?;
    let line = container.shell("cat /proc/cmdline")?;
    pod.remove()?;
    Ok(line)
}

pub fn own_settings(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", |_| true)?;
        let install = ["install", "--payload", &payload];
        let of_one = word("size=large");
        let first = installer.succeed(&[&install[..], &["--runtime-class", &of_one]].concat())?;
        done("a first install", &first, true, true)?;
        // The node's own settings are the class's, too: without them its guest would ask for KVM here.
        contains("the class's guest", &command_line(node, LARGE, "large")?, "size=large")?;
        let ordinary = command_line(node, HANDLER, "ordinary")?;
        claim(
            !ordinary.contains("size="),
            format!("only the class has its settings: {ordinary}"),
        )?;

        let of_one = word("size=larger");
        let other = installer.succeed(&[&install[..], &["--runtime-class", &of_one]].concat())?;
        done("other settings", &other, true, false)?;
        contains(
            "the class's guest",
            &command_line(node, LARGE, "larger")?,
            "size=larger",
        )?;
        same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;

        // Pods of a class that is not asked for any more keep their handler as long as they run.
        let pod = node.pod_with_handler(LARGE, "last").run()?;
        let kept = installer.succeed(&install)?;
        done("an install without the class", &kept, false, false)?;
        contains(
            "the warnings",
            &kept.warnings.join("; "),
            "because of pods such as default/last-",
        )?;
        claim(node.inside(FILE).exists(), "the class's file should be there")?;
        let refused = installer.run(&["uninstall"])?;
        let sentence_of_pods = "pods with the handler `kata-large` still run (1, such as default/last-";
        sentence(&refused, Code::SandboxesExist, sentence_of_pods)?;
        pod.remove()?;
        let gone = installer.succeed(&install)?;
        done("an install after the last pod", &gone, true, true)?;
        claim(!node.inside(FILE).exists(), "the class's file should be gone")?;
        same(
            "a pod of the class",
            node.pod_with_handler(LARGE, "late").run().is_err(),
            true,
        )?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

/// A change of settings that fails is undone, and still known as the installer's own: the next try makes it.
pub fn undone_and_made(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", super::small)?;
        let install = |configuration: &str, class: &str, more: &[&str]| {
            let words = ["--configuration", configuration, "--runtime-class", class];
            installer.run(&[&["install", "--payload", &payload], &words[..], more].concat())
        };
        let (one, two) = ("[runtime]\nenable_debug = true\n", "[runtime]\nenable_debug = false\n");
        done("a first install", &install(one, &word("size=large"), &[])?, true, true)?;
        let before = installer.tree()?;
        // Another class is a change of the drop-in, for which containerd is restarted.
        let more = ["--runtime-class", "kata-debug=", "--restart-command", "false"];
        let failed = install(two, &word("size=larger"), &more)?;
        sentence(&failed, Code::RestartFailed, "`false` ended with exit status: 1")?;
        installer.tree()?.same_as(&before)?;
        let made = install(two, &word("size=larger"), &more[..2])?;
        done("the next try", &made, true, true)?;
        let edited = made.warnings.iter().find(|warning| warning.contains("was edited"));
        same("files that are taken for others'", edited, None)?;
        let file = node.inside(FILE);
        let text = || fs::read_to_string(&file).trying("reading the class's file");
        contains("the class's file", &text()?, "size=larger")?;
        same("the phase", installer.succeed(&["verify"])?.phase, Phase::Verified)?;

        // The file is the installer's, whoever has edited it.
        let right = text()?;
        fs::write(&file, right.clone() + "# edited\n").trying("editing the class's file")?;
        done(
            "a repair",
            &install(two, &word("size=larger"), &more[..2])?,
            true,
            false,
        )?;
        same("the class's file", text()?, right)?;
        fs::write(&file, "[runtime]\n").trying("replacing the class's file")?;
        let foreign = install(two, &word("size=larger"), &more[..2])?;
        let why = "/etc/sandpod/runtime-classes/kata-large.toml exists and is not Sandpod's: move it away";
        sentence(&foreign, Code::ForeignFile, why)?;
        fs::remove_file(&file).trying("moving the class's file away")?;
        done(
            "a last install",
            &install(two, &word("size=larger"), &more[..2])?,
            true,
            false,
        )?;
        installer.succeed(&["uninstall"]).map(drop)
    })
}

pub fn what_cannot_be(node: &Node) -> Result {
    play(node, |installer| {
        let payload = installer.payload("1.0.0", super::small)?;
        let install = |word: &str| installer.run(&["install", "--payload", &payload, "--runtime-class", word]);
        let before = installer.tree()?;
        let typo = install("kata-large=[hypervisor.qemu]\nkernel_parms = \"a\"\n")?;
        let why = "the configuration of the RuntimeClass kata-large is not valid: unknown configuration key \
                   `hypervisor.qemu.kernel_parms`";
        sentence(&typo, Code::ConfigInvalid, why)?;

        let main = node.inside(MAIN);
        let text = fs::read_to_string(&main).trying("reading containerd's configuration")?;
        let theirs = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata-large]\n\
                      runtime_type = \"io.containerd.runc.v2\"\n";
        fs::write(&main, text.clone() + theirs).trying("writing containerd's configuration")?;
        let foreign = install("kata-large=");
        fs::write(&main, text).trying("writing containerd's configuration back")?;
        let why = "/etc/containerd/config.toml already defines a handler `kata-large`, which Sandpod did not write";
        sentence(&foreign?, Code::ForeignHandler, why)?;
        installer.tree()?.same_as(&before)
    })
}
