//! Containers and processes from creation to removal.

use std::sync::Arc;

use super::pod::Pod;

super::cases![a_container_runs_to_its_exit_code];

async fn a_container_runs_to_its_exit_code(pod: Arc<Pod>) {
    println!(
        "first answer after {:?}; {:?}",
        pod.answered, pod.details.agent_details.extra_features
    );
    pod.run("c", "echo hello; exit 7").await;
    assert_eq!(pod.output("c", "c").await, b"hello\n");
    assert_eq!(pod.wait("c", "").await, 7);
    pod.remove("c").await;
}
