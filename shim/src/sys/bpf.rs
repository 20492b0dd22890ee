//! bpf(2), as far as an `sk_lookup` program needs it. Numbers are those of linux/bpf.h.

use nix::libc;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// One instruction, `struct bpf_insn`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    /// Operation, destination and source register (0 to 10), offset, immediate value.
    pub const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            registers: destination | source << 4,
            offset,
            immediate,
        }
    }
}

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const LICENSE: &CStr = c"Apache-2.0";

/// The parts of `union bpf_attr`, each up to its last field that is used.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u64,
    key: *const u32,
    value: *const u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    count: u32,
    instructions: *const Instruction,
    license: *const libc::c_char,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A map of one socket, at key 0.
///
/// # Errors
/// No right to use BPF, or a kernel without it.
pub fn socket_map(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let create = MapCreate {
        map_type: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
    };
    // SAFETY: the kernel reads the structure, which has no pointers.
    let map = unsafe { new_fd(MAP_CREATE, &create) }?;
    let (key, value) = (0, u64::from(raw(socket)));
    let update = MapUpdate {
        map: raw(&map).into(),
        key: &raw const key,
        value: &raw const value,
        flags: 0,
    };
    // SAFETY: the kernel reads the structure, and a key and a value of the map's sizes, which outlive the call.
    unsafe { bpf(MAP_UPDATE, &update) }?;
    Ok(map)
}

/// Loads a program.
///
/// # Errors
/// The kernel's verifier refuses it; a kernel before 5.9.
pub fn load_sk_lookup(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let load = ProgLoad {
        prog_type: PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr(),
        license: LICENSE.as_ptr(),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"sandpod_forward\0",
        ifindex: 0,
        expected_attach_type: ATTACH_SK_LOOKUP,
    };
    // SAFETY: the kernel reads the structure, as many instructions as it says, and a string that ends; all outlive the
    // call.
    unsafe { new_fd(PROG_LOAD, &load) }
}

/// Lets a program decide in a network namespace, until the returned descriptor is closed.
///
/// # Errors
/// No right to.
pub fn attach_sk_lookup(program: &impl AsFd, namespace: &impl AsFd) -> io::Result<OwnedFd> {
    let create = LinkCreate {
        program: raw(program),
        target: raw(namespace),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the kernel reads the structure, which has no pointers.
    unsafe { new_fd(LINK_CREATE, &create) }
}

/// An open descriptor is no negative number.
fn raw(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

/// # Safety
/// A command that makes a descriptor; else as [`bpf`].
unsafe fn new_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// The attributes are those of the command, without padding, and what they point to is what it expects.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads as many bytes as the type has; the rest is the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    Ok(nix::Error::result(result)?)
}
