//! Standard streams and terminals.

use std::sync::Arc;

use agent_protocol::{
    client::{ClientError, LONGEST_READ},
    protocol::agent::*,
};
use serde_json::json;

use super::pod::{Pod, base, create, process};

super::cases![
    a_hundred_mebibytes_come_out,
    what_goes_in_comes_out,
    closing_the_input_ends_it,
    output_outlives_its_process,
    a_grandchild_does_not_hold_the_output_back_for_long,
    reads_are_as_short_as_asked,
    a_terminal_has_a_size_and_one_output,
    an_exec_has_a_terminal_of_its_own,
    a_closed_input_is_refused,
];

async fn a_hundred_mebibytes_come_out(pod: Arc<Pod>) {
    const MEBIBYTE: usize = 1 << 20;
    pod.run(
        "c",
        "dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' x; echo; echo done >&2",
    )
    .await;
    let began = std::time::Instant::now();
    let (mut all, mut reads) = (0, 0);
    loop {
        let data = pod.read("c", "", LONGEST_READ).await;
        if data.is_empty() {
            break;
        }
        reads += 1;
        all += data.len();
        let text = data.strip_suffix(b"\n").unwrap_or(&data);
        assert!(text.iter().all(|byte| *byte == b'x'));
    }
    println!("100 MiB in {reads} reads and {:?}", began.elapsed());
    assert_eq!(all, 100 * MEBIBYTE + 1);
    assert_eq!(pod.errors("c", "").await, "done\n");
    assert_eq!(pod.wait("c", "").await, 0);
    pod.remove("c").await;
}

async fn what_goes_in_comes_out(pod: Arc<Pod>) {
    pod.run("c", "cat").await;
    let sent: Vec<u8> = (0..4_000_000u32).map(|n| (n % 251) as u8).collect();
    let writer = tokio::spawn({
        let (pod, sent) = (Arc::clone(&pod), sent.clone());
        async move {
            for chunk in sent.chunks(300_000) {
                pod.write("c", "", chunk).await;
            }
            // Upstream's way to end the input.
            pod.write("c", "", b"").await;
        }
    });
    assert!(pod.output("c", "").await == sent);
    writer.await.unwrap();
    assert_eq!(pod.wait("c", "").await, 0);
    pod.remove("c").await;
}

async fn closing_the_input_ends_it(pod: Arc<Pod>) {
    pod.run("c", "sleep 600").await;
    pod.try_exec("c", "x", process("wc -c; exit 2")).await.unwrap();
    pod.write("c", "x", b"12345").await;
    let mut request = CloseStdinRequest::new();
    (request.container_id, request.exec_id) = ("c".into(), "x".into());
    pod.client.close_stdin(request).await.unwrap();
    assert_eq!(pod.output("c", "x").await, b"5\n");
    assert_eq!(pod.wait("c", "x").await, 2);
    pod.remove("c").await;
}

async fn output_outlives_its_process(pod: Arc<Pod>) {
    pod.run("c", "seq 1 5000").await;
    assert_eq!(pod.wait("c", "").await, 0);
    let expected: String = (1..=5000).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8(pod.output("c", "").await).unwrap(), expected);
    // The end stays the end.
    assert_eq!(pod.read("c", "", 10).await, b"");
    pod.remove("c").await;
}

async fn a_grandchild_does_not_hold_the_output_back_for_long(pod: Arc<Pod>) {
    pod.run("c", "sleep 600").await;
    // One that is silent, and one that never is.
    for background in ["sleep 600", "yes"] {
        let began = std::time::Instant::now();
        let script = format!("echo mine; {background} & exit 1");
        pod.try_exec("c", "x", process(&script)).await.unwrap();
        assert_eq!(pod.wait("c", "x").await, 1);
        let output = pod.output("c", "x").await;
        assert!(
            output.windows(5).any(|window| window == b"mine\n"),
            "{} bytes",
            output.len()
        );
        println!("ended after {:?} with {} bytes", began.elapsed(), output.len());
    }
    pod.remove("c").await;
}

async fn reads_are_as_short_as_asked(pod: Arc<Pod>) {
    pod.run("c", "printf 0123456789").await;
    assert_eq!(pod.wait("c", "").await, 0);
    assert_eq!(pod.read("c", "", 4).await, b"0123");
    assert_eq!(pod.read("c", "", 4).await, b"4567");
    assert_eq!(pod.read("c", "", 4).await, b"89");
    assert_eq!(pod.read("c", "", 4).await, b"");
    pod.remove("c").await;
}

async fn resize(pod: &Pod, exec: &str, row: u32, column: u32) -> Result<(), ClientError> {
    let mut request = TtyWinResizeRequest::new();
    (request.container_id, request.exec_id) = ("c".into(), exec.into());
    (request.row, request.column) = (row, column);
    pod.client.tty_win_resize(request).await
}

async fn a_terminal_has_a_size_and_one_output(pod: Arc<Pod>) {
    let mut spec = base("tty; stty size; echo error >&2; read line; stty size; exit 3");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({ "height": 24, "width": 80 });
    pod.try_create(create("c", spec)).await.unwrap();
    pod.start("c").await;
    let text = pod.read_until("c", "c", "error\r\n").await;
    assert_eq!(text, "/dev/pts/0\r\n24 80\r\nerror\r\n");
    assert_eq!(pod.errors("c", "c").await, "");
    resize(&pod, "", 50, 132).await.unwrap();
    pod.write("c", "c", b"go\n").await;
    let rest = String::from_utf8(pod.output("c", "c").await).unwrap();
    assert_eq!(rest, "go\r\n50 132\r\n");
    assert_eq!(pod.wait("c", "c").await, 3);
    assert!(matches!(resize(&pod, "", 1, 1).await, Err(ClientError::NotFound(_))));
    pod.remove("c").await;
}

async fn an_exec_has_a_terminal_of_its_own(pod: Arc<Pod>) {
    pod.run("c", "sleep 600").await;
    assert!(
        resize(&pod, "c", 1, 1)
            .await
            .unwrap_err()
            .to_string()
            .contains("has no terminal")
    );
    let mut shell = process("tty; read line; echo $line");
    shell["terminal"] = json!(true);
    pod.try_exec("c", "x", shell).await.unwrap();
    pod.read_until("c", "x", "\r\n").await;
    pod.write("c", "x", b"abc\n").await;
    let rest = String::from_utf8(pod.output("c", "x").await).unwrap();
    assert!(rest.ends_with("abc\r\nabc\r\n"), "{rest:?}");
    assert_eq!(pod.wait("c", "x").await, 0);
    pod.remove("c").await;
}

async fn a_closed_input_is_refused(pod: Arc<Pod>) {
    pod.run("c", "exec <&-; echo closed; sleep 600").await;
    pod.read_until("c", "", "closed").await;
    let mut request = WriteStreamRequest::new();
    (request.container_id, request.data) = ("c".into(), b"x".to_vec());
    assert!(matches!(
        pod.client.write_stdin(request).await,
        Err(ClientError::NotFound(_))
    ));
    pod.remove("c").await;
}
