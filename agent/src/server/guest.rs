//! The guest itself: what it is, its clock, its randomness, and its hot-plugged processors and memory.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use agent_protocol::protocol::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, OnlineCPUMemRequest, ReseedRandomDevRequest,
    SetGuestDateTimeRequest,
};
use nix::sys::time::TimeSpec;

use super::{
    boot, clock,
    error::{Doing, Error, Result},
    storage, sys,
    uevent::Uevents,
};
/// How long processors may take to appear after the host has plugged them; as long as upstream's agent waits.
const APPEARS: Duration = Duration::from_secs(5);
const MEMORY: &str = "/sys/devices/system/memory";
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Describes the guest and its agent. `began` is the guest's clock when the agent began to run.
pub(super) fn details(request: &GuestDetailsRequest, began: Duration) -> Result<GuestDetailsResponse> {
    let mut response = GuestDetailsResponse::new();
    if request.mem_block_size {
        response.mem_block_size_bytes = memory_block()?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = Path::new(MEMORY).join("probe").exists();
    }
    let mut agent = AgentDetails::new();
    agent.version = env!("CARGO_PKG_VERSION").into();
    agent.init_daemon = true;
    agent.storage_handlers = storage::DRIVERS.map(str::to_owned).to_vec();
    agent.supports_seccomp = true;
    // In microseconds: the first two, since the kernel's start, for the host's waterfall, the third, since the epoch,
    // for whoever keeps the guest's clock.
    agent.extra_features = vec![
        format!("sandpod.pid1_us={}", began.as_micros()),
        format!("sandpod.now_us={}", boot::clock().as_micros()),
        format!("sandpod.wall_us={}", clock::now_us().doing(|| "read the clock".into())?),
    ];
    if clock::is_kept() {
        agent.extra_features.push("sandpod.clock=host".into());
    }
    response.agent_details = Some(agent).into();
    Ok(response)
}

/// Bytes of the smallest piece of memory that can be plugged; 0 if the kernel cannot.
fn memory_block() -> Result<u64> {
    let path = Path::new(MEMORY).join("block_size_bytes");
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
        Ok(text) => u64::from_str_radix(text.trim(), 16)
            .map_err(io::Error::other)
            .doing(|| format!("read {}", path.display())),
    }
}

/// Takes hot-plugged processors and memory into use. `nb_cpus` is how many processors the guest is to have in use in
/// all (`src/agent/src/sandbox.rs` of kata-containers); those that are not there yet are waited for. Idempotent.
/// Blocks.
///
/// # Errors
/// Fewer have appeared; those are in use.
pub(super) fn online(request: &OnlineCPUMemRequest) -> Result<()> {
    // Before the first look, so that nothing appears unseen.
    let appearing = Uevents::listen().doing(|| "listen for devices".into())?;
    let wanted = request.nb_cpus as usize;
    let mut online = 0;
    let all_there = appearing.block_until(Instant::now() + APPEARS, || {
        for processor in offline(PROCESSORS, "cpu", "online", "0")? {
            fs::write(processor.join("online"), "1")?;
        }
        online = count(&fs::read_to_string(Path::new(PROCESSORS).join("online"))?);
        Ok(online >= wanted)
    });
    if !all_there.doing(|| "take processors into use".into())? {
        let text = format!("{wanted} processors are wanted and {online} have appeared");
        return Err(Error::Io("take processors into use".into(), io::Error::other(text)));
    }
    if !request.cpu_only {
        // The kernel has mostly done it by itself (`memhp_default_state`).
        let blocks = offline(MEMORY, "memory", "state", "offline").doing(|| format!("read {MEMORY}"))?;
        for block in blocks {
            fs::write(block.join("state"), "online").doing(|| format!("take {} into use", block.display()))?;
        }
    }
    Ok(())
}

/// The folders of `class` called `prefix` and a number in which `file` says `value`.
fn offline(class: &str, prefix: &str, file: &str, value: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(class) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix))
            .unwrap_or_default();
        if number.parse::<u32>().is_ok() {
            // The first processor has no such file: it cannot be taken out of use.
            let state = fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            if state.trim() == value {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// How many numbers a list like `0-2,4` has.
fn count(list: &str) -> usize {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
    });
    ranges.map(|(first, last)| (last + 1).saturating_sub(first)).sum()
}

/// Mixes the host's entropy into the kernel's random numbers.
pub(super) fn reseed(request: &ReseedRandomDevRequest) -> Result<()> {
    if request.data.is_empty() {
        return Err(Error::Invalid("ReseedRandomDev has no data".into()));
    }
    let random = OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .doing(|| "open /dev/urandom".into())?;
    sys::add_entropy(&random, &request.data).doing(|| "add entropy".into())
}

/// Sets the clock, or slews it where that is enough.
pub(super) fn set_time(request: &SetGuestDateTimeRequest) -> Result<()> {
    if request.Sec < 0 || !(0..1_000_000).contains(&request.Usec) {
        return Err(Error::Invalid(format!(
            "{} s {} µs is no date",
            request.Sec, request.Usec
        )));
    }
    clock::set(TimeSpec::new(request.Sec, request.Usec * 1000)).doing(|| "set the clock".into())
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn processors_are_counted_by_their_ranges() {
        assert_eq!(count("0\n"), 1);
        assert_eq!(count("0-2,4,6-7\n"), 6);
        assert_eq!(count(""), 0);
    }
}
