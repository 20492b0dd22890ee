//! From `start` to Shutdown, when all goes well.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use containerd_shim_protos::api::Status;
use serde_json::Value;
use tests::failure::{Failure, Result, Trying, claim, contains, same};

use super::{BOTH, OURS, Told};
use crate::{
    bundle::Wanted,
    crio::{Crio, Runtime},
    pod::{Pod, PodWanted, RESOLVER},
    process::{self, Kind},
    task::ORDINARY,
};

/// This module's stories.
pub const TOLD: Told = &[
    (OURS, "the_program_answers_crio_at_its_start_up", probes),
    (BOTH, "a_pod_of_two_containers_runs_and_is_removed", pod_of_two),
    (BOTH, "a_container_has_what_crio_gave_it", furnished),
    (BOTH, "a_container_is_reached_at_the_pods_address", reached),
    (
        OURS,
        "a_network_that_comes_after_the_machine_is_connected",
        connected_later,
    ),
    (BOTH, "state_repeats_the_streams_of_create_verbatim", state),
    (BOTH, "containers_come_and_go_in_a_pod_that_stays", come_and_go),
    (OURS, "pod_sysctls_are_set_in_the_guest", sysctls),
];

fn probes(crio: &Crio<'_>) -> Result {
    let suffix = crio
        .basename()
        .strip_prefix("containerd-shim-")
        .map(str::to_owned)
        .unwrap_or_default();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'+';
    claim(
        !suffix.is_empty() && suffix.bytes().all(allowed),
        format!("CRI-O drops a handler whose program is {:?}", crio.basename()),
    )?;
    let version = crio.probe("--version")?;
    same("the exit code of --version", version.code, 0)?;
    claim(
        !version.text().is_empty() && version.errors().is_empty(),
        format!("--version says {version:?}"),
    )?;
    let features = crio.probe("features")?;
    same("the exit code of features", features.code, 0)?;
    let document: Value = serde_json::from_slice(&features.stdout).map_err(|source| Failure::Json {
        what: "the features document".into(),
        source,
    })?;
    for key in ["ociVersionMin", "ociVersionMax"] {
        claim(
            document[key].is_string(),
            format!("the features document has no {key}: {document}"),
        )?;
    }
    same("standard error of features", features.errors(), "")?;
    same(
        "daemons after the probes",
        process::running(Kind::Shim, crio),
        Vec::<i32>::new(),
    )
}

fn pod_of_two(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let first = pod.idle()?;
    let second = pod.idle()?;
    for container in [&first, &second] {
        same(
            "the address for a container of the pod",
            &container.address,
            &pod.sandbox.address,
        )?;
        container.is(Status::RUNNING)?;
        same("the container's own word", container.shell("echo $((6 * 7))")?, "42")?;
    }
    same("shims of the pod", process::running(Kind::Shim, crio).len(), 1)?;
    if crio.runtime == Runtime::Sandpod {
        process::only(Kind::Vm, crio)?;
    }
    pod.end([first, second])
}

fn furnished(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let volume = pod.volume("data")?;
    fs::write(volume.join("from-host"), "from the host\n").trying("writing into a volume")?;
    let file = volume.join("file");
    fs::write(&file, "a single file\n").trying("writing a file to be a volume")?;
    let wanted = Wanted::idle()
        .with_volume(&volume, "/data", false)
        .with_volume(&file, "/etc/single", true);
    let container = pod.start(&wanted)?;
    container.stdout()?.line("ready", ORDINARY)?;
    same(
        "resolv.conf",
        container.shell("cat /etc/resolv.conf")?,
        RESOLVER.trim_end(),
    )?;
    same(
        "/etc/hostname",
        container.shell("cat /etc/hostname")?,
        pod.facts.name.as_str(),
    )?;
    same("the host name", container.shell("hostname")?, pod.facts.name.as_str())?;
    same("$HOSTNAME", container.shell("echo $HOSTNAME")?, pod.facts.name.as_str())?;
    same(
        "a file from the host",
        container.shell("cat /data/from-host")?,
        "from the host",
    )?;
    container.shell("echo from the container >/data/from-container")?;
    let seen = fs::read_to_string(volume.join("from-container")).trying("reading what the container wrote")?;
    same("a file from the container", seen.as_str(), "from the container\n")?;
    same("a single file", container.shell("cat /etc/single")?, "a single file")?;
    let refused = container.exec(&["sh", "-c", "echo x >/etc/single"])?;
    claim(refused.code != 0, "a read-only volume was written")?;
    contains("the mounts", &container.shell("cat /proc/mounts")?, " /dev/shm ")?;
    container.shell("echo x >/dev/shm/x && test -e /run/.containerenv && test -d /sys/fs/cgroup")?;
    container.shell("echo kept >/root/written && cat /root/written")?;
    let upper = container.rootfs.merged.join("root/written");
    same(
        "what the container wrote into its root file system",
        fs::read_to_string(upper).trying("reading it")?.as_str(),
        "kept\n",
    )?;
    pod.end([container])
}

fn reached(crio: &Crio<'_>) -> Result {
    answers(Pod::run(crio)?)
}

fn connected_later(crio: &Crio<'_>) -> Result {
    let wanted = PodWanted {
        late_network: true,
        ..PodWanted::default()
    };
    answers(Pod::run_with(crio, &wanted)?)
}

/// A web server in the pod is reached from the node.
fn answers(pod: Pod<'_, '_>) -> Result {
    let container = pod.start(&Wanted::shell("echo ready; exec httpd -f -p 80 -h /www"))?;
    container.stdout()?.line("ready", ORDINARY)?;
    // The server's own socket is asked for inside, so that the dial from outside needs no second try.
    container.shell("until wget -q -O /dev/null http://127.0.0.1/; do :; done")?;
    let address = SocketAddr::from((pod.address(), 80));
    let mut stream = TcpStream::connect_timeout(&address, ORDINARY).trying(format!("dialling the pod at {address}"))?;
    stream.set_read_timeout(Some(ORDINARY)).trying("setting a deadline")?;
    let mut page = String::new();
    stream
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .and_then(|()| stream.read_to_string(&mut page))
        .trying("reading a page from the pod")?;
    contains("the page", &page, tests::images::PAGE.trim_end())?;
    drop(stream);
    pod.end([container])
}

fn state(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    pod.sandbox.is(Status::RUNNING)?;
    let mut plain = pod.create(&Wanted::idle().with_stdin())?;
    let created = plain.is(Status::CREATED)?;
    claim(
        created.pid > 0,
        "State.pid of a created container is 0, which means stopped",
    )?;
    plain.start()?;
    let running = plain.is(Status::RUNNING)?;
    claim(
        running.pid > 0,
        "State.pid of a running container is 0, which means stopped",
    )?;
    let mut terminal = pod.start(&Wanted::idle().with_tty())?;
    terminal.is(Status::RUNNING)?;
    for container in [&mut plain, &mut terminal] {
        container.stop(crate::pod::GRACE)?;
        container.exited(ORDINARY)?;
        container.is(Status::STOPPED)?;
    }
    pod.end([plain, terminal])
}

fn come_and_go(crio: &Crio<'_>) -> Result {
    let pod = Pod::run(crio)?;
    let mut stays = pod.idle()?;
    for round in 0..3 {
        let mut brief = pod.start(&Wanted::shell(&format!("echo round {round}; exit {round}")))?;
        same("its exit code", brief.exited(ORDINARY)?.exit_status, round)?;
        same(
            "its output",
            brief.stdout()?.end(ORDINARY)?,
            format!("round {round}\n").into_bytes(),
        )?;
        brief.rootfs.unmount()?;
        brief.remove()?;
        stays.is(Status::RUNNING)?;
    }
    // A container restarts as a new one; the first may go at last.
    let again = pod.idle()?;
    stays.stop(crate::pod::GRACE)?;
    stays.remove()?;
    same("the other's word", again.shell("echo here")?, "here")?;
    pod.end([again])
}

fn sysctls(crio: &Crio<'_>) -> Result {
    let sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    let wanted = PodWanted {
        sysctls: sysctls.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec(),
        ..PodWanted::default()
    };
    let pod = Pod::run_with(crio, &wanted)?;
    let container = pod.idle()?;
    for (key, value) in sysctls {
        same(
            key,
            container.shell(&format!("cat /proc/sys/{}", key.replace('.', "/")))?,
            value,
        )?;
    }
    pod.end([container])
}
