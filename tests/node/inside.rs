//! Stories of the other suites, played in the node: what was shown with emulated guests holds with KVM, the kernel's
//! vsock and vhost-net.

use std::time::Duration;

use tests::{failure::Result, machine::Machine};

use crate::Story;

pub const STORIES: &[Story] = &[("stories_of_crio", stories_of_crio)];

/// More, and all of them.
pub const AT_LENGTH: &[Story] = &[
    ("stories_of_containerd", stories_of_containerd),
    ("every_story_of_containerd", every_story_of_containerd),
    ("every_story_of_crio", every_story_of_crio),
];

/// How long a choice of stories may take.
const CHOICE: Duration = Duration::from_secs(3600);

/// How long all of them may take.
const ALL: Duration = Duration::from_secs(6 * 3600);

fn stories_of_containerd(node: &Machine) -> Result {
    const NAMES: &[&str] = &[
        "containerd-2.4/own/a_port_is_forwarded",
        "containerd-2.4/own/a_block_volume_is_the_pods",
        "containerd-2.4/own/a_running_container_is_resized",
        "containerd-2.4/own/a_root_who_is_nobody_elsewhere",
        "containerd-2.4/own/a_task_without_kubernetes",
    ];
    node.play("e2e", NAMES, CHOICE)
}

fn stories_of_crio(node: &Machine) -> Result {
    const NAMES: &[&str] = &["sandpod::huge_pages_come_and_go_with_their_container"];
    node.play("contract", NAMES, CHOICE)
}

fn every_story_of_containerd(node: &Machine) -> Result {
    node.play("e2e", &[], ALL)
}

fn every_story_of_crio(node: &Machine) -> Result {
    node.play("contract", &[], ALL)
}
