//! Servers of mail and files, and a container that is a machine of its own.

use serde_json::json;
use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, contains, same},
    node::Node,
};

use crate::{PATIENCE, Story, at_length, host_path, software};

pub const STORIES: &[Story] = &[("systemd_starts_a_unit", systemd_starts_a_unit)];

pub const AT_LENGTH: &[Story] = &[
    (
        "postfix_in_its_chroot_delivers_mail",
        postfix_in_its_chroot_delivers_mail,
    ),
    ("samba_shares_a_volume", samba_shares_a_volume),
];

/// Postfix, whose parts run in a chroot with files and devices of its own, takes mail from sendmail(1) and by SMTP from
/// the other container, and puts it into a mailbox on a volume, where that one reads it.
fn postfix_in_its_chroot_delivers_mail(node: &Node, runtime: Runtime) -> Result {
    let mail = host_path(node, "mail")?;
    let pod = node.pod(runtime, "mail")?.run()?;
    let serve = "set -e; cd /var/spool/postfix; cp /etc/resolv.conf /etc/hosts /etc/services etc/
        mknod -m 666 dev/null c 1 3; mknod -m 666 dev/urandom c 1 9
        useradd --uid 1000 someone; touch /var/mail/someone; chown someone:mail /var/mail/someone
        postconf -e myhostname=mail.test mydestination=mail.test,localhost inet_interfaces=loopback-only \
            maillog_file=/dev/stdout alias_maps= alias_database=
        postconf -F smtp/inet/chroot cleanup/unix/chroot tlsmgr/unix/chroot | grep -c ' = y'
        exec postfix start-fg";
    let server = software(&pod, "postfix", serve)?
        .volume(&mail, "/var/mail", Access::ReadWrite)
        .run()?;
    server.wait_for_log_within("daemon started", PATIENCE)?;
    let reader = software(&pod, "reader", "exec sleep infinity")?
        .volume(&mail, "/var/mail", Access::ReadOnly)
        .security("run_as_user", json!({ "value": 1000 }))
        .run()?;
    server.shell("printf 'Subject: by a program\\n\\nhello\\n' | sendmail someone@mail.test")?;
    let send = "printf 'Subject: by SMTP\\r\\n\\r\\nhello\\r\\n' >/tmp/mail
        curl -sS --ssl-reqd --insecure smtp://127.0.0.1 --mail-from other@mail.test --mail-rcpt someone@mail.test --upload-file /tmp/mail";
    at_length(&reader, send)?;
    for subject in ["by a program", "by SMTP"] {
        let look = || match reader.shell("cat /var/mail/someone") {
            Ok(mails) if mails.contains(&format!("Subject: {subject}")) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        node.events()
            .bell
            .until(&format!("the mail {subject}"), PATIENCE, look)?;
    }
    server.stop(60)?;
    pod.remove()
}

const SHARE: &str = "[global]
server role = standalone server
map to guest = bad user
guest account = root
log level = 1
disable netbios = yes
load printers = no
[share]
path = /srv/share
read only = no
guest ok = yes
store dos attributes = yes
";

/// Samba shares a volume, with its locks, leases and attributes, with a client in the other container.
fn samba_shares_a_volume(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("samba-{}", node.serial()));
    node.write(&settings.join("smb.conf"), SHARE)?;
    let share = host_path(node, "share")?;
    let pod = node.pod(runtime, "samba")?.run()?;
    let serve = "exec smbd --foreground --no-process-group --debug-stdout --configfile /settings/smb.conf";
    let server = software(&pod, "server", serve)?
        .volume(&settings, "/settings", Access::ReadOnly)
        .volume(&share, "/srv/share", Access::ReadWrite)
        .run()?;
    let client = software(&pod, "client", "exec sleep infinity")?.run()?;
    let ask = |commands: &str| {
        at_length(
            &client,
            &format!("cd /tmp; smbclient --configfile /dev/null -N //127.0.0.1/share -c '{commands}'"),
        )
    };
    let listening = || {
        let said = |failure| format!("{failure}; the server says {:?}", server.logs());
        ask("ls").map(drop).map_err(said)
    };
    node.events().bell.until("an answer of Samba", PATIENCE, listening)?;
    client.shell("seq 1 200000 >/tmp/numbers")?;
    ask("mkdir deep; cd deep; put numbers; setmode numbers +h; rename numbers counted; get counted back")?;
    same(
        "what came back",
        client.shell("cmp /tmp/numbers /tmp/back && echo same")?.as_str(),
        "same",
    )?;
    contains("its attributes", &ask("cd deep; allinfo counted")?, "attributes: HA")?;
    same(
        "on the volume",
        server.shell("wc -l </srv/share/deep/counted")?.as_str(),
        "200000",
    )?;
    server.stop(60)?;
    pod.remove()
}

const UNIT: &str = "[Service]
ExecStart=/usr/bin/busybox httpd -f -p 8080 -h /settings
DynamicUser=yes
PrivateTmp=yes
ProtectSystem=strict
RuntimeDirectory=hello
MemoryMax=64M
";

/// The first process of a privileged container is systemd, which starts a unit as a user of its own, in a cgroup with a
/// limit; it ends in order.
fn systemd_starts_a_unit(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("units-{}", node.serial()));
    node.write(&settings.join("hello.service"), UNIT)?;
    node.write(&settings.join("index.html"), "hello from a unit\n")?;
    let pod = node.pod(runtime, "systemd")?.privileged().run()?;
    let boot = "set -e; rm -r /etc/systemd/system/*.wants; mkdir /etc/systemd/system/multi-user.target.wants
        cp /settings/hello.service /etc/systemd/system/; ln -s ../hello.service /etc/systemd/system/multi-user.target.wants/
        systemctl set-default multi-user.target; systemctl mask getty.target console-getty.service
        exec env container=oci /sbin/init";
    let machine = software(&pod, "machine", boot)?
        .volume(&settings, "/settings", Access::ReadOnly)
        .privileged()
        .run()?;
    let answer = || {
        node.get(&pod.ip().map_err(|e| e.to_string())?, 8080, "/")
            .map_err(|failure| failure.to_string())
    };
    let page = node.events().bell.until("the unit's answer", PATIENCE, answer)?;
    same("the unit's page", page.as_str(), "hello from a unit\n")?;
    let state = at_length(
        &machine,
        "systemctl is-system-running --wait || systemctl --failed --plain --no-legend",
    )?;
    same("the machine", state.as_str(), "running")?;
    let seen = at_length(
        &machine,
        "systemctl restart hello; systemctl show -P ActiveState -P ControlGroup -P MemoryMax hello
         ps -o user= -p $(systemctl show -P MainPID hello); journalctl -q -b -u hello | grep -c Started",
    )?;
    contains("the unit", &seen, "active")?;
    machine.kill("SIGRTMIN+3")?;
    // The first process that switches its PID namespace off ends by SIGINT (reboot(2)).
    same("the machine's exit code", machine.wait_exit_within(PATIENCE)?.code, 130)?;
    pod.remove()
}
