//! The namespaces of a pod with a user namespace (`hostUsers: false`).
//!
//! ```text
//! PID 1 ──fork──▶ maker ──▶ user namespace ──(PID 1 writes its maps)──▶ network, IPC and UTS namespaces that belong to it
//!   └──────────────joins these three, and keeps the user namespace for the containers◀──────────────┘ (ends)
//! ```
//!
//! Who is root of a user namespace may do to a network what root may do only if the network belongs to it; so the pod's
//! is one of its own, and not the one that the guest began with. PID 1 lives in the pod's from its first moment on, and
//! remains root of the guest. What the kernel tells of devices, and the devices themselves, come to the guest's first
//! network namespace only: PID 1 looks there by threads that end with the look.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::OnceLock,
};

use agent_protocol::idmap::IdMaps;
use futures::TryStreamExt;
use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::wait::waitpid,
    unistd::{Pid, pipe2, read, write},
};
use rtnetlink::{LinkUnspec, packet_route::link::LinkAttribute};

use super::error::{Doing, Error, Result};
use crate::engine::sys;

/// Where containers find the pod's user namespace.
pub(super) const USER: &str = "/run/kata-agent-user-namespace";

/// What belongs to the user namespace, in the order in which it is made.
const OWNED: [(&str, CloneFlags); 3] = [
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

static POD: OnceLock<PodNamespaces> = OnceLock::new();

/// The namespaces of a pod that has a user namespace.
#[derive(Debug)]
pub(super) struct PodNamespaces {
    /// Its IDs.
    pub(super) maps: IdMaps,
    /// The network namespace that the guest began with.
    guest_network: File,
    /// The pod's.
    network: File,
}

/// The pod's, if it has a user namespace.
pub(super) fn of_pod() -> Option<&'static PodNamespaces> {
    POD.get()
}

/// Makes and joins them if the kernel's command line asks for it. Before there is a thread; `/proc` is there.
pub(super) fn join() -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline").doing(|| "read the kernel's command line".into())?;
    let maps = IdMaps::from_command_line(&line).map_err(|error| Error::Invalid(error.to_string()))?;
    let Some(maps) = maps else { return Ok(()) };
    let made = make(maps).doing(|| "make the pod's user namespace".into())?;
    // Nobody else sets it.
    let _ = POD.set(made);
    Ok(())
}

fn make(maps: IdMaps) -> io::Result<PodNamespaces> {
    let (told, tell) = pipe2(OFlag::O_CLOEXEC)?;
    let (asked, ask) = pipe2(OFlag::O_CLOEXEC)?;
    let Some(maker) = sys::fork()? else {
        drop((told, ask));
        let code = i32::from(be_the_maker(&tell, &asked).is_err());
        sys::exit_now(code)
    };
    drop((tell, asked));
    let made = follow_the_maker(maker, maps, &told, &ask);
    // It ends now, in whatever it was.
    drop((told, ask));
    waitpid(maker, None)?;
    made
}

/// In the process that makes them.
fn be_the_maker(tell: &OwnedFd, asked: &OwnedFd) -> nix::Result<()> {
    let step = |flags: CloneFlags| {
        unshare(flags)?;
        write(tell, b".")?;
        // Until PID 1 has done its part, or is not interested any more.
        read(asked, &mut [0]).map(drop)
    };
    step(CloneFlags::CLONE_NEWUSER)?;
    step(OWNED.iter().fold(CloneFlags::empty(), |all, (_, flag)| all | *flag))
}

fn follow_the_maker(maker: Pid, maps: IdMaps, told: &OwnedFd, ask: &OwnedFd) -> io::Result<PodNamespaces> {
    let wait = || match read(told, &mut [0])? {
        1 => Ok(()),
        _ => Err(io::Error::other("the process that was to make it has ended")),
    };
    wait()?;
    for (file, ranges) in maps.files() {
        fs::write(format!("/proc/{maker}/{file}"), ranges)?;
    }
    write(ask, b".")?;
    wait()?;
    let open = |process: &str, name: &str| File::open(format!("/proc/{process}/ns/{name}"));
    let maker = maker.to_string();
    let guest_network = open("self", "net")?;
    let network = open(&maker, "net")?;
    fs::write(USER, "")?;
    let user = format!("/proc/{maker}/ns/user");
    mount(Some(user.as_str()), USER, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    for (name, kind) in OWNED {
        setns(open(&maker, name)?, kind)?;
    }
    Ok(PodNamespaces {
        maps,
        guest_network,
        network,
    })
}

/// Does something in the network namespace that the guest began with, where the kernel tells of devices. Blocks.
pub(super) fn in_guest_network<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    match of_pod() {
        None => work(),
        Some(pod) => pod.in_guest_network(work),
    }
}

impl PodNamespaces {
    fn in_guest_network<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let look = scope.spawn(|| {
                setns(self.guest_network.as_fd(), CloneFlags::CLONE_NEWNET)?;
                work()
            });
            look.join()
                .unwrap_or_else(|_| Err(io::Error::other("the look panicked")))
        })
    }

    /// Moves the network card with this address, if it has come, to the pod. Blocks for some milliseconds.
    pub(super) fn adopt(&self, mac: [u8; 6]) -> io::Result<()> {
        let pod = self.network.as_raw_fd();
        let find_and_move = async move || -> io::Result<()> {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let mut links = handle.link().get().execute();
            while let Some(link) = links.try_next().await.map_err(io::Error::other)? {
                let found =
                    |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Address(found) if *found == mac);
                if link.attributes.iter().any(found) {
                    let moved = LinkUnspec::new_with_index(link.header.index).setns_by_fd(pod).build();
                    return handle.link().change(moved).execute().await.map_err(io::Error::other);
                }
            }
            Ok(())
        };
        self.in_guest_network(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(find_and_move())
        })
    }
}
