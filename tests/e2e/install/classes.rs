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
