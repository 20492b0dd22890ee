//! Answers that are too much for whoever reads them.

use agent_protocol::{
    client::LONGEST_READ,
    protocol::{
        agent::{BlkioStatsEntry, GuestDetailsResponse, StatsContainerResponse},
        relay::ReceiveResponse,
    },
};

use crate::encode;

/// Bytes of the longest answers that the shim takes, without what is around them.
pub const MOST: usize = LONGEST_READ as usize;

/// Metrics of which one line is a guest's to say.
pub const SPOOFED: &str = "\
# TYPE kata_guest_own gauge
kata_guest_own 1
kata_shim_fds 6.66e66
kata_hypervisor_fds 6.66e66
up 6.66e66
kata_guest_cut{item=\"x 6.66e66
kata_guest_late 1 6.66e66 6.66e66
\x1b[2J6.66e66
";

/// The smallest fields there are, as many as fit: each is a structure in the reader's memory.
pub fn crowd(tag: u8) -> Vec<u8> {
    [tag, 0].repeat(MOST / 2)
}

/// As many fields as fit that the protocol does not know, no two of the same number.
pub fn strangers() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut out = protobuf::CodedOutputStream::vec(&mut bytes);
    for number in 1000..1000 + MOST as u32 / 4 {
        // Into memory, this cannot fail.
        let _written = out.write_uint32(number, 0);
    }
    let _written = out.flush();
    drop(out);
    bytes
}

/// Data of a forwarded connection, of which there is always more.
pub fn relayed() -> Vec<u8> {
    let mut response = ReceiveResponse::new();
    response.data = vec![b'x'; MOST];
    encode(&response)
}

/// A guest that began before time, and has many features.
pub fn details() -> Vec<u8> {
    let mut details = GuestDetailsResponse::new();
    details.mem_block_size_bytes = u64::MAX;
    let features = &mut details.agent_details.mut_or_insert_default().extra_features;
    features.extend([u64::MAX, 0].map(|time| format!("sandpod.pid1_us={time}")));
    features.push(format!("sandpod.now_us={}", u64::MAX));
    features.resize(MOST / 2 - 100, String::new());
    encode(&details)
}

pub fn numbers() -> Vec<u8> {
    let mut stats = StatsContainerResponse::new();
    let cgroup = stats.cgroup_stats.mut_or_insert_default();
    let cpu = cgroup
        .cpu_stats
        .mut_or_insert_default()
        .cpu_usage
        .mut_or_insert_default();
    cpu.total_usage = u64::MAX;
    let memory = cgroup.memory_stats.mut_or_insert_default();
    memory.usage.mut_or_insert_default().usage = u64::MAX;
    memory.stats = ["anon", "oom_kill", ""].map(|name| (name.to_owned(), u64::MAX)).into();
    let mut entry = BlkioStatsEntry::new();
    (entry.op, entry.value, entry.major) = ("read".into(), u64::MAX, u64::MAX);
    cgroup.blkio_stats.mut_or_insert_default().io_service_bytes_recursive = vec![entry; 4];
    encode(&stats)
}

/// Statistics that are one list of nothing.
pub fn crowded_stats() -> Vec<u8> {
    let within = |tag: u8, body: &[u8]| {
        let mut bytes = Vec::new();
        let mut out = protobuf::CodedOutputStream::vec(&mut bytes);
        let _written = out.write_bytes(u32::from(tag), body).and_then(|()| out.flush());
        drop(out);
        bytes
    };
    within(1, &within(4, &crowd(0x0a)))
}
