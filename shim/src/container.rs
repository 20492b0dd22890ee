//! A container as the CRI knows it: a bundle, an init process, and the execs in it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use agent_protocol::protocol::agent::StatsContainerResponse;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    io::ProcessName,
    process::{Process, Status},
    stats,
};

/// What a task of the CRI is for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The sandbox's own task: it stands for the VM, and no process of the guest belongs to it.
    Sandbox,
    /// A container of a pod.
    Member,
    /// A container without a pod (`ctr run`): it has the VM for itself, which ends with it.
    Single,
}

/// One task.
pub struct Container {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Whether its PID namespace is its own.
    pub own_pids: bool,
    /// Its init process.
    pub init: Arc<Process>,
    /// Whether a process of it was killed for want of memory.
    pub oom: AtomicBool,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    last_stats: Mutex<Option<StatsContainerResponse>>,
}

/// An additional process.
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    /// What to run.
    pub spec: oci_spec::runtime::Process,
}

impl Container {
    /// A task whose init is not started yet.
    pub fn new(id: &str, kind: Kind, bundle: PathBuf, own_pids: bool, init: Process) -> Container {
        Container {
            id: id.into(),
            kind,
            bundle,
            own_pids,
            init: Arc::new(init),
            oom: AtomicBool::new(false),
            execs: Mutex::default(),
            last_stats: Mutex::default(),
        }
    }

    /// The init's name for the agent.
    pub fn init_name(&self) -> ProcessName {
        ProcessName {
            container: self.id.clone(),
            exec: self.id.clone(),
        }
    }

    /// An exec's name for the agent.
    pub fn exec_name(&self, exec: &str) -> ProcessName {
        ProcessName {
            container: self.id.clone(),
            exec: exec.into(),
        }
    }

    /// Adds an exec.
    pub fn add_exec(&self, id: &str, exec: Exec) -> Result<()> {
        let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        if execs.contains_key(id) {
            return Err(Error::AlreadyExists(format!("exec {id}")));
        }
        execs.insert(id.into(), Arc::new(exec));
        Ok(())
    }

    /// Finds an exec.
    pub fn exec(&self, id: &str) -> Result<Arc<Exec>> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        execs
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("exec {id}")))
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, id: &str) {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// The init for an empty exec id, otherwise that exec's process.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            Ok(self.init.clone())
        } else {
            Ok(self.exec(exec)?.process.clone())
        }
    }

    /// All processes with their exec ids, the init last.
    pub fn processes(&self) -> Vec<(String, Arc<Process>)> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        let execs = execs.iter().map(|(id, exec)| (id.clone(), exec.process.clone()));
        execs.chain([(String::new(), self.init.clone())]).collect()
    }

    /// Resolves when no exec runs any more. What was not started has no end.
    pub async fn execs_ended(&self) {
        let execs = self.processes().into_iter().filter(|(exec, _)| !exec.is_empty());
        for (_, process) in execs {
            if !matches!(process.status(), Status::Creating | Status::Created) {
                process.wait().await;
            }
        }
    }

    /// Keeps the statistics for those who ask after the end (containerd looks for the OOM kill there). Refuses those
    /// that no cgroup has.
    pub fn keep_stats(&self, told: StatsContainerResponse) -> Result<()> {
        stats::check(&told)?;
        *self.last_stats.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
        Ok(())
    }

    /// The last statistics that were kept.
    pub fn last_stats(&self) -> StatsContainerResponse {
        self.last_stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .unwrap_or_default()
    }

    /// Records an out-of-memory kill; answers whether it is the first. CRI-O looks for the file `oom` in the bundle.
    pub fn set_oom(&self) -> bool {
        if self.oom.swap(true, Ordering::SeqCst) {
            return false;
        }
        let path = self.bundle.join("oom");
        if let Err(error) = std::fs::write(&path, "") {
            tracing::warn!(%error, path = %path.display(), "cannot report the OOM kill to CRI-O");
        }
        true
    }
}
