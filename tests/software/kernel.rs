//! What the guest's kernel can do for programs that bring no kernel of their own, tried by the programs that ask for
//! it.

use tests::{
    config::Runtime,
    failure::{Result, claim, same},
    images::INTERFACES,
    node::Node,
};

use crate::{Story, at_length, software};

/// Stories of the guest's kernel.
pub const OF_A_VM: &[Story] = &[("a_kernel_for_the_workloads_of_pods", a_kernel_for_the_workloads_of_pods)];

/// Extensions of iptables that Docker, Calico, kube-proxy, kube-router, Istio and intrusion detection use.
const RULES: &[&str] = &[
    "-t raw -A OUTPUT -p udp --dport 53 -j CT --zone 1",
    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment x -j ACCEPT",
    "-A INPUT -m mac --mac-source 02:00:00:00:00:01 -j ACCEPT",
    "-A INPUT -p tcp --syn -m connlimit --connlimit-above 9 -j REJECT",
    "-A INPUT -m time --timestart 10:00 --timestop 11:00 -j ACCEPT",
    "-A FORWARD -m physdev --physdev-in eth9 -j ACCEPT",
    "-A INPUT -m connbytes --connbytes 1: --connbytes-dir both --connbytes-mode bytes -j ACCEPT",
    "-A INPUT -m length --length 1:99 -m pkttype --pkt-type unicast -m dscp --dscp 1 -m ecn --ecn-tcp-ece -p tcp",
    "-A INPUT -m quota --quota 99 -m helper --helper ftp -m connlabel --label 1",
    "-A INPUT -m policy --dir in --pol none -j ACCEPT",
    "-A INPUT -p sctp -m sctp --dport 9 -j ACCEPT",
    "-t raw -A PREROUTING -m rpfilter --invert -j DROP",
    "-A INPUT -m ipvs --ipvs -j ACCEPT",
    "-A INPUT -j NFQUEUE --queue-num 1",
    "-t mangle -A OUTPUT -j DSCP --set-dscp 1",
    "-t mangle -A OUTPUT -j TTL --ttl-set 9",
    "-t mangle -A POSTROUTING -j CLASSIFY --set-class 1:1",
    "-t mangle -A POSTROUTING -p udp -j CHECKSUM --checksum-fill",
    "-t mangle -A PREROUTING -j TEE --gateway 10.9.9.9",
    "-t mangle -A PREROUTING -p tcp -j TPROXY --on-port 9",
    "-t nat -A PREROUTING -d 10.8.0.0/24 -j NETMAP --to 10.7.0.0/24",
    "-t nat -A OUTPUT -m owner --uid-owner 1337 -j RETURN",
    "-A INPUT -m set --match-set hosts src -j ACCEPT",
];

/// Kinds of interfaces: VPNs, overlays, bonds, and what tests make.
const LINKS: &[&str] = &[
    "wireguard",
    "ipip remote 10.9.9.9 local 10.9.9.8",
    "gre remote 10.9.9.9 local 10.9.9.8",
    "sit remote 10.9.9.9 local 10.9.9.8",
    "ip6tnl remote fd00::1 local fd00::2",
    "vti remote 10.9.9.9 local 10.9.9.8 key 1",
    "geneve id 1 remote 10.9.9.9",
    "vxlan id 1 remote 10.9.9.9 dstport 4789",
    "xfrm if_id 1",
    "vrf table 10",
    "bond",
    "bridge",
    "dummy",
    "ifb",
    "veth",
];

/// Disciplines of traffic shaping and chaos tests.
const QDISCS: &[&str] = &[
    "netem delay 10ms loss 1%",
    "sfq",
    "cake bandwidth 9mbit",
    "tbf rate 9mbit burst 9k latency 9ms",
    "htb",
    "fq_codel",
];

/// In Perl: a socket of a kind, and a system call.
const SOCKETS: &[&str] = &[
    // SCTP, MPTCP, IPsec's keys, IPsec's policies, the kernel's ciphers
    "socket(S,2,1,132)",
    "socket(S,2,1,262)",
    "socket(S,15,3,2)",
    "socket(S,16,3,6)",
    "socket(S,38,5,0)",
    // userfaultfd(UFFD_USER_MODE_ONLY) and io_uring_setup, which wants to be told where
    "syscall(323,1)>=0",
    "syscall(425,0,0)<0 && $!{EFAULT}",
];

const FILE_SYSTEMS: &[&str] = &[
    "autofs", "cifs", "ext4", "fuse", "iso9660", "nfs", "nfs4", "overlay", "squashfs", "vfat", "xfs",
];

/// Each feature is asked for by itself; all that are refused are told together.
fn a_kernel_for_the_workloads_of_pods(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "kernel")?.privileged().run()?;
    let container = software(&pod, "asker", "exec sleep infinity")?.privileged().run()?;
    let links = at_length(&container, INTERFACES)?;
    claim(
        links
            .split_whitespace()
            .all(|name| name == "lo" || name.starts_with("eth")),
        format!("nothing but the pod's interfaces: {links}"),
    )?;
    let mut script = String::from("exec 2>&1; refused() { echo \"refused: $*\"; }\n");
    let mut ask = |command: &str| {
        script += &format!(
            "( {command} ) >/tmp/said || refused '{}' \"$(cat /tmp/said)\"\n",
            command.replace('\'', "")
        )
    };
    ask("ipset create hosts hash:ip && ipset create ports bitmap:port range 1-9 && ipset create all list:set");
    for rule in RULES {
        ask(&format!("iptables-legacy {rule}"));
        // nftables' translation takes the same extensions; what it has no rule for goes by `nft_compat`.
        ask(&format!("iptables-nft {rule}"));
    }
    ask("nft add table inet t && nft add chain inet t c && nft add rule inet t c numgen random mod 2 == 0 accept");
    ask("nft add rule inet t c ct count over 9 drop && nft add rule inet t c fib saddr type local queue num 1");
    ask("ipvsadm -A -t 10.9.9.9:80 -s rr && ipvsadm -A -t 10.9.9.9:81 -s mh");
    for link in LINKS {
        ask(&format!("ip link add x0 type {link} && ip link del x0"));
    }
    for qdisc in QDISCS {
        ask(&format!(
            "tc qdisc replace dev eth0 root {qdisc} && tc qdisc del dev eth0 root"
        ));
    }
    ask(
        "ip xfrm state add src 10.9.9.8 dst 10.9.9.9 proto esp spi 1 mode transport aead \"rfc4106(gcm(aes))\" \
         0x0102030405060708090a0b0c0d0e0f1011121314 128",
    );
    ask("ip xfrm policy add src 10.9.9.8 dst 10.9.9.9 dir out tmpl proto esp mode transport");
    for socket in SOCKETS {
        ask(&format!(
            "perl -MErrno -e \"{} or die qq(\\$!)\"",
            socket.replace('$', "\\$")
        ));
    }
    for name in FILE_SYSTEMS {
        ask(&format!("grep -qw {name} /proc/filesystems"));
    }
    ask("zcat /proc/config.gz | grep -qx CONFIG_BLK_DEV_WRITE_MOUNTED=y");
    ask("test -c /dev/mapper/control && test -c /dev/ppp && test -c /dev/fuse && test -c /dev/net/tun");
    let said = at_length(&container, &script)?;
    same("what was refused", said.as_str(), "")?;
    pod.remove()
}
