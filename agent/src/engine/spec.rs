//! Pure edits that make a specification mean to libcontainer what it means to the runtime specification.

use std::{
    collections::HashSet,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{
    Capabilities, Hook, Hooks, Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, LinuxPids,
    LinuxResources, Mount, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, Spec,
};

/// The search path of a process without `PATH`, as containerd and CRI-O set it.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Seconds for a hook that says nothing of them.
const HOOK_TIMEOUT: i64 = 30;

/// The cgroup that all containers are below, whatever the host calls theirs, so that they have a limit together.
pub(crate) const POD_CGROUP: &str = "kata";

/// Why a specification cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SpecError {
    #[error("the specification has no {0}")]
    Missing(&'static str),
    #[error("root.path is not absolute")]
    RelativeRoot,
    #[error("{0} is not supported in the guest")]
    Unsupported(String),
    #[error("the cgroup path {0:?} leaves the cgroup file system")]
    CgroupPath(PathBuf),
}

/// Refuses what cannot be honoured and fills what libcontainer would read otherwise. `id` names the default cgroup.
pub(super) fn complete(mut spec: Spec, id: &str) -> Result<Spec, SpecError> {
    refuse(&spec)?;
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    if !root.path().is_absolute() {
        return Err(SpecError::RelativeRoot);
    }
    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    complete_process(&mut process, None);
    spec.set_process(Some(process));

    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux section"))?;
    linux.set_cgroups_path(Some(cgroup_path(linux.cgroups_path().as_deref(), id)?));
    linux.set_rootfs_propagation(linux.rootfs_propagation().as_deref().map(propagation));
    let annotations = spec.annotations().as_ref();
    // Who is to be among the guest's own processes is to see its cgroups too.
    if annotations.is_none_or(|annotations| !annotations.contains_key(agent_protocol::GUEST_PIDS)) {
        add_cgroup_namespace(&mut linux);
    }
    if let Some(resources) = linux.resources_mut() {
        complete_resources(resources);
    }
    spec.set_linux(Some(linux));
    if let Some(hooks) = spec.hooks_mut() {
        limit_hooks(hooks);
    }
    Ok(spec)
}

/// Gives a container a cgroup namespace, asked for or not: on hosts with cgroup v1 the CRI asks for none, and the guest
/// has v2, where a program looks for its limits at the root of what it sees. Without one it would see the cgroups of
/// the whole guest.
fn add_cgroup_namespace(linux: &mut Linux) {
    if !has_namespace(linux, LinuxNamespaceType::Cgroup) {
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        let mut cgroup = LinuxNamespace::default();
        cgroup.set_typ(LinuxNamespaceType::Cgroup);
        namespaces.push(cgroup);
        linux.set_namespaces(Some(namespaces));
    }
}

/// Gives the hooks that run beside the container an end: whoever waits for them waits for a bounded time too.
#[allow(deprecated)] // prestart hooks: the protocol has them
fn limit_hooks(hooks: &mut Hooks) {
    let limit = |list: &Option<Vec<Hook>>| {
        let mut list = list.clone();
        for hook in list.iter_mut().flatten().filter(|hook| hook.timeout().is_none()) {
            hook.set_timeout(Some(HOOK_TIMEOUT));
        }
        list
    };
    let (prestart, runtime) = (limit(hooks.prestart()), limit(hooks.create_runtime()));
    let (poststart, poststop) = (limit(hooks.poststart()), limit(hooks.poststop()));
    hooks.set_prestart(prestart).set_create_runtime(runtime);
    hooks.set_poststart(poststart).set_poststop(poststop);
}

/// The hooks that run while a container is created, outside of it.
#[allow(deprecated)] // as above
pub(super) fn hooks_of_creation(spec: &Spec) -> Vec<Hook> {
    let hooks = spec.hooks().clone().unwrap_or_default();
    let lists = [hooks.prestart().clone(), hooks.create_runtime().clone()];
    lists.into_iter().flatten().flatten().collect()
}

/// A propagation type without the `r` that says "and everything below": libcontainer knows only the names without, and
/// means that by them. containerd and CRI-O set `rslave` for a container with a mount that is to follow the host's.
fn propagation(given: &str) -> String {
    given.strip_prefix('r').unwrap_or(given).to_owned()
}

/// The fields that libcontainer ignores, although ignoring them weakens or changes the container.
fn refuse(spec: &Spec) -> Result<(), SpecError> {
    let unsupported = |what: &str| Err(SpecError::Unsupported(what.to_owned()));
    if let Some(process) = spec.process() {
        refuse_process(process)?;
    }
    let Some(linux) = spec.linux() else { return Ok(()) };
    if !has_namespace(linux, LinuxNamespaceType::Mount) {
        return unsupported("a container without a mount namespace");
    }
    if linux.mount_label().as_deref().is_some_and(|l| !l.is_empty()) {
        return unsupported("linux.mountLabel (the guest has no SELinux)");
    }
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt");
    }
    for mount in spec.mounts().iter().flatten() {
        let mapped = |m: &Option<Vec<LinuxIdMapping>>| m.as_ref().is_some_and(|m| !m.is_empty());
        // Of a bind it takes flags and leaves the rest out.
        if is_bind(mount) && mount.options().iter().flatten().any(|o| o == "nosymfollow") {
            let destination = mount.destination().display();
            return Err(SpecError::Unsupported(format!(
                "the option nosymfollow of the mount on {destination}"
            )));
        }
        let idmap = mount.options().iter().flatten().any(|o| o == "idmap" || o == "ridmap");
        if idmap || mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
            let destination = mount.destination().display();
            return Err(SpecError::Unsupported(format!("the id-mapped mount on {destination}")));
        }
    }
    Ok(())
}

/// Whether a mount shows what is somewhere else already.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    let bind = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind)
}

fn refuse_process(process: &Process) -> Result<(), SpecError> {
    let given = |label: &Option<String>| label.as_ref().is_some_and(|l| !l.is_empty());
    if given(process.selinux_label()) {
        return Err(SpecError::Unsupported(
            "process.selinuxLabel (the guest has no SELinux)".to_owned(),
        ));
    }
    if given(process.apparmor_profile()) {
        return Err(SpecError::Unsupported(
            "process.apparmorProfile (the guest has no AppArmor)".to_owned(),
        ));
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing("command (process.args is empty)"));
    }
    Ok(())
}

/// Fills a process; `init` is the container's own, for an exec.
fn complete_process(process: &mut Process, init: Option<&Process>) {
    // An empty profile would be applied, as a profile without a name.
    process.set_apparmor_profile(None);
    let locked =
        process.no_new_privileges() == Some(true) || init.is_some_and(|init| init.no_new_privileges() == Some(true));
    process.set_no_new_privileges(locked.then_some(true));
    // libcontainer keeps every capability if there is no list, and those of a missing list.
    let inherited = init.and_then(|init| init.capabilities().clone());
    let capabilities = process.capabilities().clone().or(inherited);
    process.set_capabilities(Some(complete_capabilities(capabilities)));
    if process.oom_score_adj().is_none() {
        // The agent protects itself from the OOM killer, which would be inherited.
        let adjustment = init.and_then(Process::oom_score_adj).unwrap_or(0);
        process.set_oom_score_adj(Some(adjustment));
    }
    process.set_env(Some(environment(process.env().as_deref().unwrap_or_default())));
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd(PathBuf::from("/"));
    }
}

fn complete_capabilities(given: Option<LinuxCapabilities>) -> LinuxCapabilities {
    let mut all = given.unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        let empty = || Some(Capabilities::new());
        none.set_bounding(empty()).set_effective(empty()).set_permitted(empty());
        none.set_inheritable(empty()).set_ambient(empty());
        none
    });
    let or_empty = |list: &Option<Capabilities>| Some(list.clone().unwrap_or_default());
    all.set_bounding(or_empty(all.bounding()));
    all.set_effective(or_empty(all.effective()));
    all.set_permitted(or_empty(all.permitted()));
    all.set_inheritable(or_empty(all.inheritable()));
    all.set_ambient(or_empty(all.ambient()));
    all
}

/// The last value of each variable, in the order of first mention, with a `PATH`.
fn environment(given: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut seen = HashSet::new();
    let mut env: Vec<String> = given
        .iter()
        .rev()
        .filter(|entry| seen.insert(name(entry)))
        .cloned()
        .collect();
    env.reverse();
    if !seen.contains("PATH") {
        env.push(DEFAULT_PATH.to_owned());
    }
    env
}

/// Adds `HOME` to a completed process that has none.
pub(super) fn set_home(process: &mut Process, home: &str) {
    let mut env = process.env().clone().unwrap_or_default();
    env.retain(|entry| entry != "HOME=");
    env.push(format!("HOME={home}"));
    process.set_env(Some(env));
}

/// Whether a process names its home directory.
pub(super) fn has_home(process: &Process) -> bool {
    process
        .env()
        .iter()
        .flatten()
        .any(|entry| entry.starts_with("HOME=") && entry.len() > "HOME=".len())
}

/// Adds the limit of locked memory (bytes) to a process that sets none.
pub(super) fn set_memlock(process: &mut Process, soft: u64, hard: u64) {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    if limits.iter().any(|l| l.typ() == PosixRlimitType::RlimitMemlock) {
        return;
    }
    let limit = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitMemlock)
        .soft(soft)
        .hard(hard);
    limits.push(limit.build().unwrap_or_else(|_| PosixRlimit::default()));
    process.set_rlimits(Some(limits));
}

/// Makes limits of a container's cgroup mean what they say.
pub(super) fn complete_resources(resources: &mut LinuxResources) {
    // 0 is "no limit" to runc and to the CRI's clients; libcontainer would allow a single task.
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() <= 0) {
        let mut pids = LinuxPids::default();
        pids.set_limit(-1);
        resources.set_pids(Some(pids));
    }
}

/// Makes the limit of swap one that libcontainer applies.
///
/// Without swap in the kernel there is nothing to limit, and the write would fail. With a limit of memory and swap
/// that leaves no swap (what the kubelet sends) libcontainer would write nothing, which allows any amount.
pub(super) fn limit_swap(resources: &mut LinuxResources, kernel_has_swap: bool) {
    let Some(mut memory) = *resources.memory() else { return };
    if !kernel_has_swap {
        memory.set_swap(None);
        resources.set_memory(Some(memory));
    } else if memory
        .swap()
        .is_some_and(|swap| swap > 0 && memory.limit() == Some(swap))
    {
        let mut unified = resources.unified().clone().unwrap_or_default();
        unified
            .entry("memory.swap.max".to_owned())
            .or_insert_with(|| "0".to_owned());
        resources.set_unified(Some(unified));
    }
}

/// A container's cgroup, relative to the root of the hierarchy. `a:b:c` (systemd's form) becomes `a/b/c`.
pub(super) fn cgroup_path(given: Option<&Path>, id: &str) -> Result<PathBuf, SpecError> {
    let given = given.filter(|path| !path.as_os_str().is_empty());
    let path = match given {
        None => PathBuf::from(id),
        Some(path) => PathBuf::from(path.to_string_lossy().replace(':', "/")),
    };
    let mut relative = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(SpecError::CgroupPath(path)),
        }
    }
    if relative.as_os_str().is_empty() {
        return Err(SpecError::CgroupPath(path));
    }
    if !relative.starts_with(POD_CGROUP) {
        relative = Path::new(POD_CGROUP).join(relative);
    }
    Ok(relative)
}

/// The specification of a further process in a container whose init has the pid `init`.
///
/// libcontainer's own (`TenantContainerBuilder`) drops rlimits, the umask and the OOM score.
pub(super) fn for_exec(container: &Spec, mut process: Process, init: i32) -> Result<Spec, SpecError> {
    refuse_process(&process)?;
    complete_process(&mut process, container.process().as_ref());
    let from = container.linux().as_ref().ok_or(SpecError::Missing("linux section"))?;
    let mut linux = Linux::default();
    linux.set_namespaces(Some(joined(from, init)));
    linux.set_cgroups_path(from.cgroups_path().clone());
    // By which the owner of its streams is told.
    linux.set_uid_mappings(from.uid_mappings().clone());
    linux.set_personality(from.personality().clone());
    linux.set_resources(None);
    let mut spec = Spec::default();
    spec.set_root(container.root().clone());
    spec.set_mounts(None).set_hooks(None).set_hostname(None);
    spec.set_process(Some(process)).set_linux(Some(linux));
    Ok(spec)
}

fn joined(linux: &Linux, init: i32) -> Vec<LinuxNamespace> {
    let mut joined = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut joined {
        let file = match namespace.typ() {
            LinuxNamespaceType::Mount => "mnt",
            LinuxNamespaceType::Cgroup => "cgroup",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::User => "user",
            LinuxNamespaceType::Pid => "pid",
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Time => "time",
        };
        namespace.set_path(Some(PathBuf::from(format!("/proc/{init}/ns/{file}"))));
    }
    joined
}

pub(super) fn has_namespace(linux: &Linux, typ: LinuxNamespaceType) -> bool {
    linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == typ)
}

/// A container's id as the guest sees it; identity without a user namespace.
pub(super) fn guest_id(mappings: &Option<Vec<LinuxIdMapping>>, id: u32) -> u32 {
    let found = mappings.iter().flatten().find_map(|m| {
        let offset = id.checked_sub(m.container_id())?;
        (offset < m.size()).then(|| m.host_id() + offset)
    });
    found.unwrap_or(id)
}
