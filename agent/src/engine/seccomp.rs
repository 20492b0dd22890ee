//! A container's seccomp profile (`linux.seccomp`) as a program for the kernel, compiled once for its first process and
//! those that join it.
//!
//! libcontainer compiles the profile for each process, takes the values of a masked comparison the wrong way round and
//! knows nothing of system calls that are newer than the profile: see [`Filter::compile`].

use std::{
    fs::File,
    io::{Read, Seek},
    rc::Rc,
    str::FromStr,
};

use agent_protocol::oci::name;
use caps::{CapSet, Capability};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, error::SeccompError,
};
use nix::{libc, sys::memfd};
use oci_spec::runtime::{
    Capability as Named, LinuxCapabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall, Process,
};

use super::sys;
/// What `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE` answer when the profile does not say.
const DEFAULT_ANSWER: u32 = libc::EPERM as u32;

/// From this number on a call on x86-64 is one of x32 (`__X32_SYSCALL_BIT` in Linux).
const X32: u32 = 0x4000_0000;

/// A profile that the kernel takes.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    program: Rc<[libc::sock_filter]>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles a profile as runc does: a system call that nothing in the profile is as new as does not exist (ENOSYS)
    /// instead of being forbidden, unless the default action lets it run. A C library tries new calls and falls back on
    /// old ones when they do not exist; that they are forbidden it takes for an error.
    ///
    /// # Errors
    /// One sentence about what cannot be honoured.
    pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Filter, String> {
        let mut program = for_newer_calls(profile);
        program.extend(export(&rules(profile)?).map_err(|e| format!("linux.seccomp: {e}"))?);
        Ok(Filter {
            program: program.into(),
            flags: profile
                .flags()
                .iter()
                .flatten()
                .copied()
                .map(flag)
                .fold(0, |all, one| all | one),
        })
    }

    /// Subjects the calling process to the filter.
    fn install(&self) -> Result<(), String> {
        sys::set_seccomp_filter(&self.program, self.flags).map_err(|e| format!("seccomp: {}", e.desc()))
    }
}

fn rules(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, String> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(|e| refused("defaultAction", &e))?;
    for arch in architectures(profile) {
        filter.add_arch(arch).map_err(|e| refused("architectures", &e))?;
    }
    for call in profile.syscalls().iter().flatten() {
        let action = action(call.action(), call.errno_ret())?;
        if action == default {
            continue; // which libseccomp refuses to be told
        }
        let alternatives = conditions(call);
        for name in call.names() {
            // What libseccomp does not know is newer than it, and answered by what stands before its program.
            let Ok(number) = ScmpSyscall::from_name(name) else {
                continue;
            };
            for conditions in &alternatives {
                filter
                    .add_rule_conditional(action, number, conditions)
                    .map_err(|e| refused(name, &e))?;
            }
        }
    }
    Ok(filter)
}

fn refused(what: &str, error: &SeccompError) -> String {
    format!("linux.seccomp: {what}: {error}")
}

/// The conditions of which one has to hold, each a list that has to hold as a whole. libseccomp takes one comparison of
/// an argument in a list; of several the specification wants any (runtime-spec, config-linux, "Seccomp"; runc).
fn conditions(call: &LinuxSyscall) -> Vec<Vec<ScmpArgCompare>> {
    let arguments = call.args().as_deref().unwrap_or_default();
    let all: Vec<_> = arguments.iter().map(comparison).collect();
    let repeated = (1..arguments.len()).any(|i| arguments[..i].iter().any(|a| a.index() == arguments[i].index()));
    if repeated {
        all.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![all]
    }
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
    let value = argument.value();
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // `value` is the mask, `valueTwo` what the masked argument is compared with.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), argument.value_two().unwrap_or(0)),
    };
    // More than six arguments there are not; libseccomp refuses them by its own sentence.
    ScmpArgCompare::new(u32::try_from(argument.index()).unwrap_or(u32::MAX), operator, value)
}

fn action(action: LinuxSeccompAction, answer: Option<u32>) -> Result<ScmpAction, String> {
    if action == LinuxSeccompAction::ScmpActNotify {
        return Err("linux.seccomp: SCMP_ACT_NOTIFY is not supported in the guest: there is nobody to ask".into());
    }
    let answer =
        i32::try_from(answer.unwrap_or(DEFAULT_ANSWER)).map_err(|e| format!("linux.seccomp: errnoRet: {e}"))?;
    ScmpAction::from_str(&name(&action), Some(answer)).map_err(|e| format!("linux.seccomp: {e}"))
}

/// Those that the profile names, and the guest's own.
fn architectures(profile: &LinuxSeccomp) -> Vec<ScmpArch> {
    let named = profile.architectures().iter().flatten();
    // A name that libseccomp does not know is of a processor that the guest has not.
    let mut all: Vec<_> = named.filter_map(|arch| ScmpArch::from_str(&name(arch)).ok()).collect();
    all.push(ScmpArch::X8664);
    all.sort_by_key(|arch| *arch as u32);
    all.dedup();
    all
}

fn flag(flag: LinuxSeccompFilterFlag) -> libc::c_ulong {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // About waiting for the answer to SCMP_ACT_NOTIFY.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

/// libseccomp's program for the kernel.
fn export(filter: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, String> {
    let file = memfd::memfd_create(c"seccomp", memfd::MFdFlags::MFD_CLOEXEC).map_err(|e| e.desc().to_owned())?;
    filter.export_bpf(&file).map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    let mut file = File::from(file);
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .map_err(|e| e.to_string())?;
    let (instructions, rest) = bytes.as_chunks::<8>();
    debug_assert!(rest.is_empty());
    let read = |[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| libc::sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes([*k0, *k1, *k2, *k3]),
    };
    Ok(instructions.iter().map(read).collect())
}

/// What stands before libseccomp's program and answers ENOSYS to calls that are newer than each that the profile names.
/// Empty if the default action already does, or lets them run.
fn for_newer_calls(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    let kind = profile.default_action();
    let lets_run = matches!(
        kind,
        LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog | LinuxSeccompAction::ScmpActTrace
    );
    let enosys = libc::ENOSYS as u32;
    if lets_run || (kind == LinuxSeccompAction::ScmpActErrno && profile.default_errno_ret() == Some(enosys)) {
        return Vec::new();
    }
    let newest = |arch| {
        let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
        let numbers = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok());
        // Negative numbers are libseccomp's own, of calls that the processor has not.
        let numbers = numbers.filter_map(|call| u32::try_from(call.as_raw_syscall()).ok());
        Some((audit_arch(arch)?, numbers.max()?))
    };
    let known: Vec<_> = architectures(profile).into_iter().filter_map(newest).collect();
    assemble(&known, libc::SECCOMP_RET_ERRNO | enosys)
}

/// The instructions, for the newest call of each architecture and the answer to what is newer.
fn assemble(known: &[(u32, u32)], answer: u32) -> Vec<libc::sock_filter> {
    const ARCH: u32 = 4; // offsets in `struct seccomp_data`
    const NUMBER: u32 = 0;
    const EACH: usize = 4;
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let jump = |code: u32, k: u32, jt: usize, jf: usize| libc::sock_filter {
        code: (libc::BPF_JMP | code | libc::BPF_K) as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut program = vec![statement(load, ARCH)];
    for (done, (arch, newest)) in known.iter().enumerate() {
        // From the last instruction of this architecture: over the others to the jump at the end, and over that.
        let to_end = (known.len() - done - 1) * EACH;
        program.push(jump(libc::BPF_JEQ, *arch, 0, EACH - 1));
        program.push(statement(load, NUMBER));
        program.push(jump(libc::BPF_JGE, X32, to_end + 1, 0));
        program.push(jump(libc::BPF_JGT, *newest, to_end + 1, to_end));
    }
    // Whatever is not answered here is for libseccomp's program.
    program.push(jump(libc::BPF_JA, 1, 0, 0));
    program.push(statement(libc::BPF_RET | libc::BPF_K, answer));
    program
}

/// Linux's number for an architecture whose calls the guest's kernel can make (`AUDIT_ARCH_*`). x32 shares that of
/// x86-64, and the guest's kernel has it not.
fn audit_arch(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::X8664 => Some(0xC000_003E),
        ScmpArch::X86 => Some(0x4000_0003),
        _ => None,
    }
}

/// When and how a process comes under its filter.
///
/// Whoever may gain privileges by `execve` needs CAP_SYS_ADMIN to install a filter, and libcontainer has taken the
/// capabilities away when it hands the process over. So it is told to leave this one, and it goes with the filter's
/// coming. A process that gains nothing (`no_new_privileges`) installs it as its last step.
#[derive(Debug, Clone)]
pub(super) struct Confinement {
    filter: Option<Filter>,
    /// The sets in which CAP_SYS_ADMIN is lent.
    lent: Vec<CapSet>,
    last: bool,
}

impl Confinement {
    /// For a process whose capabilities are complete; lends it what it needs.
    pub(super) fn of(process: &mut Process, filter: Option<Filter>) -> Confinement {
        let last = process.no_new_privileges() == Some(true);
        let mut lent = Vec::new();
        if filter.is_some() && !last {
            let mut capabilities = process.capabilities().clone().unwrap_or_default();
            lent = lend(&mut capabilities);
            process.set_capabilities(Some(capabilities));
        }
        Confinement { filter, lent, last }
    }

    /// To be called as soon as the capabilities are taken away.
    pub(super) fn begin(&self) -> Result<(), String> {
        if !self.last {
            self.filter.as_ref().map_or(Ok(()), Filter::install)?;
        }
        let lost = |e: caps::errors::CapsError| format!("dropping CAP_SYS_ADMIN: {e}");
        for set in &self.lent {
            caps::drop(None, *set, Capability::CAP_SYS_ADMIN).map_err(lost)?;
        }
        Ok(())
    }

    /// To be called right before `execve`.
    pub(super) fn finish(&self) -> Result<(), String> {
        match &self.filter {
            Some(filter) if self.last => filter.install(),
            _ => Ok(()),
        }
    }
}

/// Adds CAP_SYS_ADMIN to the sets by which the kernel decides, and names those that had it not.
fn lend(capabilities: &mut LinuxCapabilities) -> Vec<CapSet> {
    let mut lent = Vec::new();
    let mut effective = capabilities.effective().clone().unwrap_or_default();
    if effective.insert(Named::SysAdmin) {
        lent.push(CapSet::Effective);
    }
    let mut permitted = capabilities.permitted().clone().unwrap_or_default();
    if permitted.insert(Named::SysAdmin) {
        lent.push(CapSet::Permitted);
    }
    capabilities
        .set_effective(Some(effective))
        .set_permitted(Some(permitted));
    lent
}
