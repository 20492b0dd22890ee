//! A container in the guest: what the host asked for, adapted to the pod's namespaces, and its processes.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use agent_protocol::{
    idmap::IdMaps,
    protocol::agent::{CreateContainerRequest, ExecProcessRequest},
};
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Spec};

use super::{
    disk::is_disk,
    error::{Error, Result},
    namespaces,
    process::Process,
};
/// The most bytes of an id: it becomes the name of a folder.
const LONGEST_ID: usize = 200;

/// A container that exists.
#[derive(Debug)]
pub(super) struct Container {
    /// Its id.
    pub(super) id: String,
    /// Its init process.
    pub(super) init: Arc<Process>,
    /// The mount points of its own storages.
    pub(super) storages: Vec<String>,
    /// The huge pages that are there for it.
    pub(super) huge_pages: u64,
    /// What of the share it may have in common with other containers.
    pub(super) volumes: HashSet<PathBuf>,
    /// Its further processes by exec_id; `None` while one is being made.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

impl Container {
    /// A container with nothing but its init.
    pub(super) fn new(
        id: String,
        init: Arc<Process>,
        storages: Vec<String>,
        huge_pages: u64,
        volumes: HashSet<PathBuf>,
    ) -> Container {
        Container {
            id,
            init,
            storages,
            huge_pages,
            volumes,
            execs: Mutex::default(),
        }
    }

    /// Whether an exec_id names the init: upstream's shims say it differently (`src/agent/src/sandbox.rs` of
    /// kata-containers).
    pub(super) fn is_init(&self, exec: &str) -> bool {
        exec.is_empty() || exec == self.id
    }

    /// Finds a process, which may have ended.
    pub(super) fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if self.is_init(exec) {
            return Ok(Arc::clone(&self.init));
        }
        match self.execs().get(exec) {
            Some(Some(process)) => Ok(Arc::clone(process)),
            _ => Err(self.no_process(exec)),
        }
    }

    /// The error of a process that is not there.
    pub(super) fn no_process(&self, exec: &str) -> Error {
        Error::NoProcess {
            container: self.id.clone(),
            exec: exec.to_owned(),
        }
    }

    /// Takes an exec_id for a process to come.
    pub(super) fn reserve(&self, exec: &str) -> Result<()> {
        if self.is_init(exec) {
            return Err(Error::Invalid(format!(
                "exec_id {exec:?} is that of the container's init"
            )));
        }
        let mut execs = self.execs();
        match execs.get(exec) {
            Some(Some(process)) if process.is_told() => {}
            None => {}
            Some(_) => {
                return Err(Error::Invalid(format!(
                    "process {exec:?} of container {:?} exists",
                    self.id
                )));
            }
        }
        execs.insert(exec.to_owned(), None);
        Ok(())
    }

    /// Puts the process in its reserved place, or gives the place up.
    pub(super) fn fill(&self, exec: &str, process: Option<Arc<Process>>) {
        let mut execs = self.execs();
        match process {
            Some(process) => drop(execs.insert(exec.to_owned(), Some(process))),
            None => drop(execs.remove(exec)),
        }
    }

    /// Forgets a further process, unless its exec_id is another's by now.
    pub(super) fn forget(&self, exec: &str, process: &Arc<Process>) {
        let mut execs = self.execs();
        if matches!(execs.get(exec), Some(Some(found)) if Arc::ptr_eq(found, process)) {
            execs.remove(exec);
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses what this agent would have to drop in silence.
pub(super) fn check_create(request: &CreateContainerRequest) -> Result<()> {
    check_id("container_id", &request.container_id)?;
    if !request.exec_id.is_empty() && request.exec_id != request.container_id {
        return Err(Error::Invalid(format!(
            "exec_id {:?} of an init is neither empty nor the container's",
            request.exec_id
        )));
    }
    if let Some(device) = request.devices.iter().find(|device| !is_disk(&device.type_)) {
        return unimplemented(format!(
            "the device {:?} of type {:?}",
            device.container_path, device.type_
        ));
    }
    if !request.shared_mounts.is_empty() {
        return unimplemented("shared_mounts");
    }
    if request.string_user.is_some() {
        return unimplemented("string_user");
    }
    check_ports([request.stdin_port, request.stdout_port, request.stderr_port])
}

/// As [`check_create`], for an exec.
pub(super) fn check_exec(request: &ExecProcessRequest) -> Result<()> {
    check_id("exec_id", &request.exec_id)?;
    if request.string_user.is_some() {
        return unimplemented("string_user");
    }
    check_ports([request.stdin_port, request.stdout_port, request.stderr_port])
}

fn check_ports(ports: [u32; 3]) -> Result<()> {
    if ports == [0; 3] {
        Ok(())
    } else {
        unimplemented("stdio on vsock ports (passfd)")
    }
}

fn unimplemented<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Unimplemented(what.into()))
}

/// Ids become names of folders and of cgroups.
pub(super) fn check_id(field: &str, id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '+');
    if !id.is_empty() && id.len() <= LONGEST_ID && id.chars().all(plain) && !id.starts_with('.') {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{field} {id:?} is not a plain name of at most {LONGEST_ID} characters"
    )))
}

/// The PID namespace of a container.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pids {
    /// One of its own.
    New,
    /// The one that its pod shares.
    At(PathBuf),
    /// The guest's, with the agent in it.
    Guest,
}

/// Whether a container asks for the guest's own PID namespace.
pub(super) fn wants_guest_pids(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.is_some_and(|all| all.get(agent_protocol::GUEST_PIDS).is_some_and(|value| value == "true"))
}

/// The container whose PID namespace a container asks for.
pub(super) fn pid_target(spec: &Spec) -> Option<String> {
    spec.annotations().as_ref()?.get(agent_protocol::PID_TARGET).cloned()
}

/// Puts a container into its pod: the guest is the pod, so its own UTS, IPC and network namespaces are those that
/// the pod's containers share.
pub(super) fn join_pod(spec: &mut Spec, pids: &Pids, of_pod: Option<&IdMaps>) -> Result<()> {
    use LinuxNamespaceType as Type;
    let mut linux = spec.linux().clone().ok_or_else(|| missing("linux"))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| !matches!(namespace.typ(), Type::Uts | Type::Ipc | Type::Network | Type::Pid));
    if let Some(user) = namespaces.iter_mut().find(|namespace| namespace.typ() == Type::User) {
        user.set_path(Some(user_namespace(&linux, of_pod)?));
    }
    let foreign = |namespace: &&LinuxNamespace| namespace.typ() != Type::User && namespace.path().is_some();
    if let Some(namespace) = namespaces.iter().find(foreign) {
        let (kind, path) = (namespace.typ(), namespace.path().clone().unwrap_or_default());
        return Err(Error::Invalid(format!(
            "the {kind} namespace {} is not the guest's",
            path.display()
        )));
    }
    let mut pid = LinuxNamespace::default();
    pid.set_typ(Type::Pid);
    match pids {
        Pids::New => namespaces.push(pid),
        Pids::At(path) => {
            pid.set_path(Some(path.clone()));
            namespaces.push(pid);
        }
        Pids::Guest => {}
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    // The pod's, which CreateSandbox has set.
    spec.set_hostname(None);
    Ok(())
}

/// Where a container finds its user namespace, which is the pod's: only that has the pod's network.
fn user_namespace(linux: &Linux, of_pod: Option<&IdMaps>) -> Result<PathBuf> {
    let wanted = IdMaps::of(linux).map_err(|error| Error::Invalid(error.to_string()))?;
    match (wanted, of_pod) {
        (Some(wanted), Some(maps)) if wanted == *maps => Ok(namespaces::USER.into()),
        (Some(wanted), Some(maps)) => Err(Error::Invalid(format!(
            "the container's ID mappings, {wanted}, are not those of its pod, {maps}"
        ))),
        (None, _) => Err(missing("linux.uidMappings for its user namespace")),
        (_, None) => Err(Error::Invalid(
            "a user namespace is the pod's: this guest was started without `sandpod.uid_map`".into(),
        )),
    }
}

/// Whether the container's init has a terminal.
pub(super) fn has_terminal(spec: &Spec) -> Result<bool> {
    let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
    Ok(process.terminal() == Some(true))
}

pub(super) fn missing(section: &str) -> Error {
    Error::Invalid(format!("the specification has no {section}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str) -> Spec {
        let text = format!(r#"{{"ociVersion":"1.0.2","hostname":"h","linux":{{"namespaces":{namespaces}}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn kinds(spec: &Spec) -> Vec<(String, Option<PathBuf>)> {
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces
            .iter()
            .map(|n| (n.typ().to_string(), n.path().clone()))
            .collect()
    }

    #[test]
    fn a_container_shares_the_guests_namespaces_but_not_its_processes() {
        let mut spec = spec(
            r#"[{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network","path":"/n"},{"type":"cgroup"}]"#,
        );
        join_pod(&mut spec, &Pids::New, None).unwrap();
        let expected = [("mnt", None), ("cgroup", None), ("pid", None)];
        assert_eq!(kinds(&spec), expected.map(|(kind, path)| (kind.to_owned(), path)));
        assert_eq!(spec.hostname(), &None);
    }

    #[test]
    fn processes_are_shared_on_demand() {
        let mut spec = spec(r#"[{"type":"mount"},{"type":"pid"}]"#);
        join_pod(&mut spec, &Pids::At("/proc/7/ns/pid".into()), None).unwrap();
        assert_eq!(kinds(&spec)[1], ("pid".into(), Some("/proc/7/ns/pid".into())));
    }

    #[test]
    fn a_namespace_of_the_host_is_refused() {
        let error = join_pod(
            &mut spec(r#"[{"type":"mount","path":"/proc/1/ns/mnt"}]"#),
            &Pids::New,
            None,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "the mnt namespace /proc/1/ns/mnt is not the guest's");
    }

    #[test]
    fn a_user_namespace_is_the_pods() {
        let text = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"user"},{"type":"mount"}],
            "uidMappings":[{"containerID":0,"hostID":100000,"size":10}],
            "gidMappings":[{"containerID":0,"hostID":100000,"size":10}]}}"#;
        let container = || -> Spec { serde_json::from_str(text).unwrap() };
        let maps = |text| IdMaps::parse(text, text).unwrap();
        let mut joined = container();
        join_pod(&mut joined, &Pids::New, Some(&maps("0:100000:10"))).unwrap();
        assert_eq!(kinds(&joined)[0], ("user".into(), Some(namespaces::USER.into())));
        let error = join_pod(&mut container(), &Pids::New, Some(&maps("0:200000:10"))).unwrap_err();
        assert!(error.to_string().contains("are not those of its pod"), "{error}");
        let error = join_pod(&mut container(), &Pids::New, None).unwrap_err();
        assert!(error.to_string().contains("without `sandpod.uid_map`"), "{error}");
    }

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "a-b_c.d", "0123456789abcdef"] {
            assert!(check_id("container_id", good).is_ok());
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"a".repeat(201)] {
            assert!(check_id("container_id", bad).is_err(), "{bad}");
        }
    }
}
