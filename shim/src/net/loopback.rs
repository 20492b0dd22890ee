//! The pod's loopback on the host, where a CRI expects what listens in the pod.
//!
//! containerd forwards a port by connecting to 127.0.0.1 in the pod's network namespace
//! (`internal/cri/server/sandbox_portforward_linux.go`). Nothing listens there: the pod's programs do it on the guest's
//! loopback. So a program in the kernel gives every TCP connection to 127.0.0.0/8 to one listener of the shim, whatever
//! its port. It needs no address, rule or module, and is gone with its file descriptor. Source:
//! `Documentation/bpf/prog_sk_lookup.rst` of Linux.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, TcpListener},
    os::fd::{AsRawFd, OwnedFd},
};

use crate::sys::bpf::{self, Instruction};

/// Takes the TCP connections to the loopback of a network namespace, as long as it lives.
#[derive(Debug)]
pub struct Loopback {
    /// Accepts them; the address that a client wanted is the local one of what is accepted.
    pub listener: TcpListener,
    /// What takes them.
    pub attached: OwnedFd,
}

impl Loopback {
    /// For the namespace of the calling thread.
    ///
    /// # Errors
    /// The loopback is down; a kernel before 5.9, or one whose lockdown forbids BPF.
    pub(super) fn take() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let sockets = bpf::socket_map(&listener)?;
        let program = bpf::load_sk_lookup(&give_to(sockets.as_raw_fd()))?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok(Self {
            listener,
            attached: bpf::attach_sk_lookup(&program, &namespace)?,
        })
    }
}

/// The program: TCP over IPv4 to 127.0.0.0/8 goes to the only socket of the map, everything else its own way.
///
/// Fields of the context are those of `struct bpf_sk_lookup` in linux/bpf.h, numbers of helpers those of `enum
/// bpf_func_id`.
fn give_to(map: i32) -> [Instruction; 24] {
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const PASS: i32 = 1;
    let i = Instruction::new;
    [
        i(0xbf, 6, 1, 0, 0),          // r6 = the context
        i(0x61, 2, 6, FAMILY, 0),     // r2 = its address family
        i(0x55, 2, 0, 19, 2),         // not AF_INET: to the end
        i(0x61, 2, 6, PROTOCOL, 0),   // r2 = its protocol
        i(0x55, 2, 0, 17, 6),         // not IPPROTO_TCP: to the end
        i(0x61, 2, 6, LOCAL_IP4, 0),  // r2 = the address that is wanted, in the network's order
        i(0x57, 2, 0, 0, 0xff),       // its first byte, which a little-endian machine has lowest
        i(0x55, 2, 0, 14, 127),       // not 127: to the end
        i(0x62, 10, 0, -4, 0),        // the key, 0, on the stack
        i(0xbf, 2, 10, 0, 0),         // r2 =
        i(0x07, 2, 0, 0, -4),         //   where the key is
        i(0x18, 1, 1, 0, map),        // r1 = the map,
        i(0x00, 0, 0, 0, 0),          //   an instruction of two
        i(0x85, 0, 0, 0, MAP_LOOKUP), // r0 = the socket
        i(0x15, 0, 0, 7, 0),          // none: to the end
        i(0xbf, 7, 0, 0, 0),          // r7 = the socket
        i(0xbf, 1, 6, 0, 0),          // r1 = the context
        i(0xbf, 2, 7, 0, 0),          // r2 = the socket
        i(0xb7, 3, 0, 0, 0),          // r3 = no flags
        i(0x85, 0, 0, 0, SK_ASSIGN),  // the connection is the socket's
        i(0xbf, 1, 7, 0, 0),          // r1 = the socket
        i(0x85, 0, 0, 0, SK_RELEASE), // which the lookup had borrowed
        i(0xb7, 0, 0, 0, PASS),       // the end: r0 = go on
        i(0x95, 0, 0, 0, 0),          // return r0
    ]
}
