//! The single-threaded process that forks a worker per request.
//!
//! ```text
//! PID 1 ──request──▶ zygote ──fork──▶ worker ──libcontainer──▶ intermediate ──▶ init or exec process
//!   ▲                 (specs)            │ (exits; the process becomes PID 1's child)
//!   └──────────────answer────────────────┘
//! ```
//!
//! It holds the specifications of the containers and their seccomp filters, so that a worker has them by being forked.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd},
};

use nix::fcntl::OFlag;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources, Spec};

use super::{
    pause,
    seccomp::Filter,
    spec, sys,
    wire::{self, Answer, Request},
    worker::{self, Outcome},
};

/// What a container's processes are made from.
struct Held {
    /// Without `linux.seccomp`, which is in `filter`.
    spec: Spec,
    filter: Option<Filter>,
}

impl Held {
    fn new(spec: Spec, id: &str) -> Result<Held, String> {
        let mut spec = spec::complete(spec, id).map_err(|e| e.to_string())?;
        let profile = spec.linux_mut().as_mut().and_then(|linux| linux.seccomp_mut().take());
        let filter = profile.as_ref().map(Filter::compile).transpose()?;
        Ok(Held { spec, filter })
    }
}

/// Serves requests until PID 1 closes its end.
pub(super) fn serve(socket: &OwnedFd) -> i32 {
    let ready = reserve_standard_streams().is_ok()
        && sys::ignore_children().is_ok()
        && nix::sys::prctl::set_name(c"container-engine").is_ok();
    if !ready {
        return 1;
    }
    let mut containers = HashMap::new();
    loop {
        match wire::receive_request(socket.as_fd()) {
            Ok(Some((answer, body, streams))) => handle(&mut containers, socket, &answer, body, streams),
            Ok(None) => return 0,
            // A request without its descriptors has nobody to answer to.
            Err(_) => {}
        }
    }
}

/// A kernel without a console starts PID 1 without standard streams; received descriptors must not take their
/// numbers, as libcontainer copies streams over them one after the other.
fn reserve_standard_streams() -> nix::Result<()> {
    loop {
        let fd = nix::fcntl::open("/dev/null", OFlag::O_RDWR, nix::sys::stat::Mode::empty())?;
        if fd.as_raw_fd() > 2 {
            return Ok(());
        }
        let _kept_open = fd.into_raw_fd();
    }
}

fn handle(
    containers: &mut HashMap<String, Held>,
    socket: &OwnedFd,
    answer: &OwnedFd,
    body: File,
    streams: Vec<OwnedFd>,
) {
    let prepared = wire::parse_request(body).map_err(|e| format!("the request: {e}"));
    let outcome = match prepared.and_then(|request| admit(containers, request)) {
        Ok(Some(request)) => match sys::fork() {
            Ok(None) => work(containers, request, socket, answer, streams),
            Ok(Some(_)) => return,
            Err(e) => Err(format!("forking a worker: {}", e.desc())),
        },
        Ok(None) => Ok((Answer::Done, Vec::new())),
        Err(error) => Err(error),
    };
    send(answer, outcome);
}

/// Does the part of a request that concerns the zygote's memory; `None` if that was all.
fn admit(containers: &mut HashMap<String, Held>, request: Request) -> Result<Option<Request>, String> {
    match request {
        Request::Create {
            id,
            notify,
            spec,
            streams,
        } => {
            if containers.contains_key(&id) {
                return Err(format!("container {id} exists"));
            }
            let held = Held::new(*spec, &id)?;
            let spec = Box::new(held.spec.clone());
            containers.insert(id.clone(), held);
            Ok(Some(Request::Create {
                id,
                notify,
                spec,
                streams,
            }))
        }
        Request::Update { id, mut resources } => {
            let held = containers.get_mut(&id).ok_or_else(|| unknown(&id))?;
            keep_devices(&mut held.spec, &mut resources);
            Ok(Some(Request::Update { id, resources }))
        }
        Request::Forget { id } => {
            containers.remove(&id);
            Ok(None)
        }
        other => Ok(Some(other)),
    }
}

/// libcontainer replaces the device rules with each update, also with one that has none.
fn keep_devices(container: &mut Spec, update: &mut LinuxResources) {
    let given = |rules: &Option<Vec<LinuxDeviceCgroup>>| rules.as_ref().is_some_and(|rules| !rules.is_empty());
    let Some(current) = container.linux_mut().as_mut().and_then(|l| l.resources_mut().as_mut()) else {
        return;
    };
    if given(update.devices()) {
        current.set_devices(update.devices().clone());
    } else {
        update.set_devices(current.devices().clone());
    }
}

/// The life of a worker; never returns to the zygote's loop.
fn work(
    containers: &HashMap<String, Held>,
    request: Request,
    socket: &OwnedFd,
    answer: &OwnedFd,
    fds: Vec<OwnedFd>,
) -> ! {
    // Only the zygote may hold its end, or PID 1 would not notice the zygote's death.
    let _ = nix::unistd::close(socket.as_raw_fd());
    let outcome = sys::default_children()
        .map_err(|e| format!("resetting signals: {}", e.desc()))
        .and_then(|()| dispatch(containers, request, fds));
    send(answer, outcome);
    sys::exit_now(0)
}

fn dispatch(containers: &HashMap<String, Held>, request: Request, fds: Vec<OwnedFd>) -> Outcome {
    let container = |id: &str| containers.get(id).ok_or_else(|| unknown(id));
    let mismatch = "the request's streams do not match its descriptors";
    match request {
        Request::Create {
            id,
            notify,
            spec,
            streams,
        } => {
            let filter = container(&id)?.filter.clone();
            let stdio = wire::join(streams, fds).ok_or(mismatch)?;
            worker::create(&id, *spec, filter, &notify, stdio)
        }
        Request::Exec {
            id,
            init,
            notify,
            process,
            streams,
        } => {
            let stdio = wire::join(streams, fds).ok_or(mismatch)?;
            let held = container(&id)?;
            worker::exec(&id, &held.spec, held.filter.clone(), *process, init, &notify, stdio)
        }
        Request::Update { id, resources } => worker::update(&id, &container(&id)?.spec, *resources),
        Request::Hooks { id, init, stage } => worker::hooks(&id, &container(&id)?.spec, init, stage),
        Request::Pause { user } => pause::start(user.as_deref()),
        Request::Forget { .. } => Ok((Answer::Done, Vec::new())),
    }
}

fn send(socket: &OwnedFd, outcome: Outcome) {
    let (answer, fds) = outcome.unwrap_or_else(|text| {
        let text = text.chars().take(wire::MAX_TEXT).collect();
        (Answer::Failed(text), Vec::new())
    });
    // Fails if PID 1 has given up on the request; then there is nobody to tell.
    let _ = wire::send_answer(socket.as_fd(), &answer, &fds);
}

fn unknown(id: &str) -> String {
    format!("container {id} does not exist")
}
