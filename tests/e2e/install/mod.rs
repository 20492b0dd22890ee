//! A node that has nothing but containerd: Sandpod comes to it, is replaced while pods run, and goes again.

mod bad;
mod classes;
mod containerd;
mod crio;
mod distribution;
mod imports;
mod life;
mod security;
mod undo;
mod version;

use std::{fs, process::Command};

use installer_report::{Code, Report};
use tests::{
    config,
    failure::{Result, Trying, claim, same},
    installer::Installer,
    node::Node,
    run,
};

/// A story and its name.
type Story = (&'static str, fn(&Node) -> Result);

/// Stories of the installer.
pub const ON_A_BARE_NODE: &[Story] = &[
    ("one_command_brings_pods_and_another_takes_them_away", life::one_command),
    ("a_pod_outlives_three_versions", life::a_pod_outlives_three_versions),
    ("qemu_needs_nothing_of_the_node", life::qemu_needs_nothing_of_the_node),
    ("another_prefix_is_as_good", life::another_prefix),
    ("an_installer_that_is_killed_is_run_again", undo::killed_and_run_again),
    ("what_fails_is_undone", undo::what_fails_is_undone),
    ("a_bad_node_gets_one_sentence_and_no_change", bad::bad_nodes),
    ("files_are_labelled_where_selinux_is_enabled", security::labels),
    (
        "the_nodes_own_configuration_stays_as_it_is",
        containerd::own_configuration_stays,
    ),
    ("an_edit_that_waits_for_a_restart_is_told", containerd::edit_is_told),
    (
        "each_version_of_the_main_file_stays_as_it_is",
        imports::versions_3_and_4,
    ),
    (
        "a_line_is_added_for_who_asks_and_taken_out_again",
        imports::added_and_taken_out,
    ),
    (
        "what_an_earlier_release_has_installed_is_taken_over",
        version::taken_over,
    ),
    ("a_runtime_class_has_settings_of_its_own", classes::own_settings),
    ("a_runtime_class_that_cannot_be_is_named", classes::what_cannot_be),
    (
        "settings_that_were_undone_are_made_the_next_time",
        classes::undone_and_made,
    ),
    ("what_is_damaged_goes_too", undo::damaged_goes_too),
    ("the_locks_are_roots_alone", security::locks_are_roots),
    (
        "a_cri_o_that_lists_no_handlers_proves_them",
        crio::proves_by_its_configuration,
    ),
    (
        "a_handler_that_cri_o_leaves_out_fails_the_install",
        crio::a_handler_that_is_left_out_fails,
    ),
    (
        "a_cri_o_that_tells_nothing_is_believed",
        crio::one_that_tells_nothing_is_believed,
    ),
];

/// Stories of a node whose containerd is inside k3s.
pub const ON_A_NODE_OF_K3S: &[Story] = &[("the_kubelets_containerd_and_no_other", distribution::k3s)];

/// Stories of a node whose containerd does not start with a drop-in of a later version than its main file's.
pub const ON_A_STRICT_NODE: &[Story] = &[
    ("one_command_brings_pods_and_another_takes_them_away", life::one_command),
    (
        "the_nodes_own_configuration_stays_as_it_is",
        containerd::own_configuration_stays,
    ),
    (
        "each_version_of_the_main_file_stays_as_it_is",
        imports::versions_3_and_4,
    ),
];

/// Stories of a node whose containerd takes one version for all files of its configuration.
pub const ON_AN_EARLIER_NODE: &[Story] = &[
    ("one_command_brings_pods_and_another_takes_them_away", life::one_command),
    (
        "the_nodes_own_configuration_stays_as_it_is",
        containerd::own_configuration_stays,
    ),
    (
        "a_drop_in_of_another_version_is_put_right",
        containerd::drop_in_put_right,
    ),
    ("each_version_of_the_main_file_stays_as_it_is", imports::version_3),
];

/// Stories of a node whose containerd is of Debian.
pub const ON_AN_OLD_NODE: &[Story] = &[("an_old_containerd_is_refused", bad::an_old_containerd_is_refused)];

/// Takes longer than it is worth each time.
pub const AT_LENGTH: &[Story] = &[("an_installer_that_is_killed_at_any_moment", undo::killed_at_any_moment)];

const HANDLER: &str = "kata";
const DROP_IN: &str = "/etc/containerd/conf.d/50-kata.toml";

/// The administrator says that guests are emulated, where this machine has no KVM.
fn administrator(node: &Node) -> Result {
    match config::accelerator() {
        "tcg" => node.write(
            &node.inside("/etc/sandpod/config.d/10-tcg.toml"),
            "[hypervisor.qemu]\naccelerator = \"tcg\"\n",
        ),
        _ => Ok(()),
    }
}

/// Ends a story: what the administrator wrote goes, too.
fn forget_administrator(node: &Node) -> Result {
    match fs::remove_dir_all(node.inside("/etc/sandpod")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).trying("removing /etc/sandpod"),
        _ => Ok(()),
    }
}

/// Plays on a node whose administrator has said how guests run, and claims that its files are as they were in the end.
fn play(node: &Node, tell: impl FnOnce(&Installer) -> Result) -> Result {
    administrator(node)?;
    let told = node.with_installer(|installer| {
        let before = installer.tree()?;
        tell(installer)?;
        installer.tree()?.same_as(&before)
    });
    told.and(forget_administrator(node))
}

/// Only what starts pods is left out: what there is is installed in a moment.
fn small(path: &str) -> bool {
    path.starts_with("bin/containerd-shim") || path == "configuration.toml" || path.starts_with("share/doc")
}

/// What a run has done to the node.
fn done(what: &str, report: &Report, changed: bool, restarted: bool) -> Result {
    same(
        &format!("{what}: changed, restarted"),
        (report.changed, report.restarted),
        (changed, restarted),
    )
}

/// Fails unless the report has this error.
fn sentence(report: &Report, code: Code, beginning: &str) -> Result {
    let problem = report.error.as_ref();
    let got = problem.map(|problem| (problem.code, problem.text.clone()));
    claim(
        got.as_ref()
            .is_some_and(|(kind, text)| *kind == code && text.starts_with(beginning) && !text.contains('\n')),
        format!("expected {code:?}, {beginning:?}, got {got:?}"),
    )
}

/// containerd's configuration on a bare node.
const MAIN: &str = "/etc/containerd/config.toml";

fn shell(node: &Node, script: &str) -> Result {
    let mut command: Command = node.command("sh");
    run::succeed(command.args(["-c", script]), run::ORDINARY).map(drop)
}
