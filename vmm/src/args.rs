//! Renders a [`VmSpec`] to QEMU's arguments: a pure function, fixed by the files in `tests/golden/`.

use std::{ffi::OsString, os::fd::RawFd};

use crate::spec::{Accelerator, MemoryPlug, VmSpec};

/// Id of the virtio-mem device.
pub const VIRTIO_MEM_ID: &str = "vmem0";
/// Bytes of a virtio-mem block: what it plugs and unplugs at a time.
pub const VIRTIO_MEM_BLOCK: u64 = 2 << 20;
/// Name of the virtio-serial port that leads to the agent.
pub const AGENT_PORT: &str = "sandpod.agent";
/// The most that an x86 kernel takes of its command line (COMMAND_LINE_SIZE without the final NUL), in bytes.
pub const LONGEST_COMMAND_LINE: usize = 2047;
/// Timer ticks per second of our guest kernel and of Debian's (CONFIG_HZ).
const HZ: u64 = 250;
/// Empty slots for devices that are plugged into a running VM.
pub(crate) const ROOT_PORTS: u32 = 2;

/// Numbers of the open files that QEMU inherits, and what else is only known when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdNumbers {
    /// The kernel.
    pub kernel: RawFd,
    /// The initrd.
    pub initrd: RawFd,
    /// Our end of the QMP conversation, seen from QEMU.
    pub qmp: RawFd,
    /// Where the guest's console goes.
    pub console: RawFd,
    /// What leads to the agent.
    pub channel: ChannelFd,
    /// The connection to virtiofsd; used if the VM has a virtiofs device.
    pub fs: Option<RawFd>,
    /// One tap per interface.
    pub taps: Vec<RawFd>,
    /// Empty, or one vhost-net device per interface.
    pub vhost_net: Vec<RawFd>,
    /// Frequency in kHz of the host's time stamp counter, which is the guest's under TCG.
    pub tsc_khz: u64,
}

/// The open file behind each kind of channel to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelFd {
    /// A socket that becomes the virtio-serial port.
    VirtioSerial(RawFd),
    /// `/dev/vhost-vsock`.
    VhostVsock {
        /// The device.
        fd: RawFd,
        /// Context id of the guest.
        cid: u32,
        /// Host port where the guest says that it is ready.
        ready_port: u32,
    },
}

/// QEMU's arguments, without the program.
pub fn render(spec: &VmSpec, fds: &FdNumbers) -> Vec<OsString> {
    let mut args = Args(Vec::new());
    args.basics(spec);
    args.memory(spec);
    args.pair("-kernel", proc_path(fds.kernel));
    args.pair("-initrd", proc_path(fds.initrd));
    args.pair("-append", command_line(spec, fds));
    args.monitor_and_console(fds);
    args.channel(fds.channel);
    args.common_devices();
    if let (Some(fs), Some(fd)) = (&spec.fs, fds.fs) {
        args.pair("-chardev", format!("socket,id=fs,fd={fd}"));
        args.device(format!(
            "vhost-user-fs-pci,chardev=fs,tag={},queue-size={}",
            fs.tag, fs.queue_size
        ));
    }
    args.nics(spec, fds);
    for device in spec.passthrough.devices() {
        args.device(device);
    }
    args.0.into_iter().map(OsString::from).collect()
}

/// The guest's kernel command line.
pub fn command_line(spec: &VmSpec, fds: &FdNumbers) -> String {
    let mut line = String::from(
        "console=hvc0 quiet panic=-1 reboot=t noreplace-smp swiotlb=noforce memhp_default_state=online \
         memory_hotplug.online_policy=auto-movable cgroup_no_v1=all",
    );
    // Drivers that are built in make interfaces at boot, and tunnels one in each namespace (`tunl0`, `sit0`). A node
    // has none of them until somebody asks for one, and a pod has those of its namespace only.
    line += " dummy.numdummies=0 bonding.max_bonds=0 ifb.numifbs=0 fb_tunnels=none";
    // For the sake of huge pages Linux holds back four times the memory that it would otherwise, 24 MiB of 2 GiB more.
    let held_back_kib = (spec.memory.boot_mib * 1024 * 16).isqrt();
    line += &format!(" sysctl.vm.min_free_kbytes={held_back_kib}");
    // Each processor would keep an eighth of all memory for itself, where neither a container nor the host gets at it.
    line += " sysctl.vm.percpu_pagelist_high_fraction=1024";
    // A quarter of the tables that Linux makes for a server of this size: 3 MiB of 2 GiB more.
    let (names, inodes, connections) = (
        spec.memory.boot_mib * 32,
        spec.memory.boot_mib * 16,
        spec.memory.boot_mib * 2,
    );
    line += &format!(" dhash_entries={names} ihash_entries={inodes} thash_entries={connections}");
    if spec.accelerator == Accelerator::Tcg {
        // The translator has neither kvmclock nor a deadline timer: what the guest would measure, it is told.
        let (khz, loops) = (fds.tsc_khz, fds.tsc_khz * 1000 / HZ);
        line += &format!(" tsc=reliable tsc_early_khz={khz} lpj={loops}");
        // Linux waits ten ticks for the timer's interrupt, and panics without a word on a host too busy to have the
        // translator deliver it. Under KVM it does not look.
        line += " no_timer_check";
    }
    if let ChannelFd::VhostVsock { ready_port, .. } = fds.channel {
        line += &format!(" sandpod.ready_port={ready_port}");
    }
    for param in &spec.kernel_params {
        line.push(' ');
        line += param;
    }
    line
}

fn proc_path(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn pair(&mut self, flag: &str, value: impl Into<String>) {
        self.flag(flag);
        self.0.push(value.into());
    }

    fn device(&mut self, device: impl Into<String>) {
        self.pair("-device", device);
    }

    fn basics(&mut self, spec: &VmSpec) {
        self.pair("-name", &spec.name);
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            self.flag(flag);
        }
        self.pair("-display", "none");
        if spec.seccomp {
            self.pair(
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            );
        }
        self.pair(
            "-machine",
            "q35,memory-backend=ram0,dump-guest-core=off,sata=off,smbus=off,vmport=off,usb=off",
        );
        if let Some(gib) = spec.passthrough.window_gib() {
            self.pair("-global", format!("q35-pcihost.pci-hole64-size={gib}G"));
        }
        match spec.accelerator {
            Accelerator::Kvm => {
                self.pair("-accel", "kvm");
                // Counters would let a guest watch its neighbours. Virtual machines within it are what KVM has most
                // code for that a guest can reach and a pod does not use. Each name is unknown to no processor.
                let virtualization = if spec.nested { "" } else { ",vmx=off,svm=off" };
                self.pair("-cpu", format!("host,pmu=off{virtualization}"));
            }
            Accelerator::Tcg => {
                // Holds what a pod runs from its boot to its end: 32 MiB fill up on the way, and filling up throws all
                // of it away. One thread for all vCPUs: with one each, QEMU 7.2 gives up when a vCPU is plugged while
                // the buffer is full.
                self.pair("-accel", "tcg,thread=single,tb-size=48");
                // Without the promise of fast string moves the guest copies in words, which an emulator does faster
                // than bytes.
                self.pair("-cpu", "max,-erms");
            }
        }
        let (boot, max) = (spec.vcpus.boot, spec.vcpus.max);
        self.pair("-smp", format!("{boot},maxcpus={max},sockets=1,cores={max},threads=1"));
    }

    fn memory(&mut self, spec: &VmSpec) {
        let (boot, max) = (spec.memory.boot_mib, spec.memory.max_mib);
        let plug = max - boot;
        if plug == 0 {
            self.pair("-m", format!("{boot}M"));
        } else {
            let slots = match spec.memory.plug {
                MemoryPlug::VirtioMem => 1,
                MemoryPlug::PcDimm { slots } => slots,
            };
            self.pair("-m", format!("{boot}M,slots={slots},maxmem={max}M"));
        }
        self.pair("-object", format!("memory-backend-memfd,id=ram0,size={boot}M,share=on"));
        if plug > 0 && spec.memory.plug == MemoryPlug::VirtioMem {
            self.pair(
                "-object",
                format!("memory-backend-memfd,id={VIRTIO_MEM_ID}-ram,size={plug}M,share=on,reserve=off"),
            );
            self.device(format!(
                "virtio-mem-pci,id={VIRTIO_MEM_ID},memdev={VIRTIO_MEM_ID}-ram,node=0,requested-size=0,block-size={VIRTIO_MEM_BLOCK}"
            ));
        }
    }

    fn monitor_and_console(&mut self, fds: &FdNumbers) {
        self.pair("-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
        self.pair("-mon", "chardev=qmp,mode=control");
        self.device("virtio-serial-pci,id=serial0,max_ports=3");
        self.pair("-chardev", format!("socket,id=console,fd={}", fds.console));
        self.device("virtconsole,bus=serial0.0,nr=0,chardev=console");
    }

    fn channel(&mut self, channel: ChannelFd) {
        match channel {
            ChannelFd::VirtioSerial(fd) => {
                self.pair("-chardev", format!("socket,id=agent,fd={fd}"));
                self.device(format!(
                    "virtserialport,bus=serial0.0,nr=1,chardev=agent,name={AGENT_PORT}"
                ));
            }
            ChannelFd::VhostVsock { fd, cid, .. } => {
                self.device(format!("vhost-vsock-pci,vhostfd={fd},guest-cid={cid}"));
            }
        }
    }

    fn common_devices(&mut self) {
        self.pair("-object", "rng-builtin,id=rng0");
        self.device("virtio-rng-pci,rng=rng0");
        self.device("virtio-balloon-pci,free-page-reporting=on");
        for port in 1..=ROOT_PORTS {
            self.device(format!(
                "pcie-root-port,id=rp{port},bus=pcie.0,chassis={port},slot={port}"
            ));
        }
    }

    fn nics(&mut self, spec: &VmSpec, fds: &FdNumbers) {
        for (index, (nic, tap)) in spec.nics.iter().zip(&fds.taps).enumerate() {
            let vhost = match fds.vhost_net.get(index) {
                Some(fd) => format!(",vhost=on,vhostfd={fd}"),
                None => String::new(),
            };
            self.pair("-netdev", format!("tap,id=net{index},fd={tap}{vhost}"));
            let (mac, mtu) = (&nic.mac, nic.mtu);
            self.device(format!(
                "virtio-net-pci,netdev=net{index},mac={mac},host_mtu={mtu},romfile="
            ));
        }
    }
}
