//! A process is killed in the middle of what its pod is asked to do: each process, each verb.
//!
//! A verb is rehearsed first, so that the death can come after a quarter, half and three quarters of the time that it
//! takes. Whatever the verb then answers, it answers soon, and the pod can be removed soon; what is left, the stage
//! looks at. (Deaths of a pod that is idle are stories of their own, in `deaths`.)

use std::{
    thread,
    time::{Duration, Instant},
};

use tests::{
    config::Runtime,
    console::Console,
    cri::{Container, Pod},
    failure::{Failure, Result, claim},
    node::Node,
    procs::Process,
};

use crate::deaths::{AGENT, find, kill_if_there};

/// How soon after a death a verb has answered, and how long the removal of the pod may take then.
const NO_HANG: Duration = Duration::from_secs(10);

/// How long a shim stays that nobody remembers.
const FORGOTTEN: Duration = Duration::from_secs(45);

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Shim,
    Qemu,
    Virtiofsd,
    Agent,
    Containerd,
}

/// In the middle of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    RunPod,
    Create,
    Start,
    Exec,
    Update,
    StopPod,
    RemovePod,
}

use Verb::{Create, Exec, RemovePod, RunPod, Start, StopPod, Update};
use Victim::{Agent, Containerd, Qemu, Shim, Virtiofsd};

const VICTIMS: [Victim; 5] = [Shim, Qemu, Virtiofsd, Agent, Containerd];
const VERBS: [Verb; 7] = [RunPod, Create, Start, Exec, Update, StopPod, RemovePod];

/// What `make test` plays: each victim and each verb once or twice.
const BRIEF: &[(Victim, Verb)] = &[
    (Shim, RunPod),
    (Qemu, Create),
    (Virtiofsd, Start),
    (Containerd, Exec),
    (Agent, Update),
    (Qemu, StopPod),
    (Shim, RemovePod),
];

/// One victim in one verb.
#[derive(Clone, Copy)]
pub struct Cell {
    victim: Victim,
    verb: Verb,
}

/// Every cell. The agent can be killed from its own guest only, which must have booted.
pub fn cells() -> impl Iterator<Item = Cell> {
    let all = VICTIMS
        .into_iter()
        .flat_map(|victim| VERBS.map(|verb| Cell { victim, verb }));
    all.filter(|cell| (cell.victim, cell.verb) != (Agent, RunPod))
}

impl Cell {
    /// Such as `qemu_dies_during_update`.
    pub fn name(self) -> String {
        let verb = match self.verb {
            RunPod => "run_pod",
            Create => "create",
            Start => "start",
            Exec => "exec",
            Update => "update",
            StopPod => "stop_pod",
            RemovePod => "remove_pod",
        };
        format!("{}_dies_during_{verb}", format!("{:?}", self.victim).to_lowercase())
    }

    pub fn by_default(self) -> bool {
        BRIEF.contains(&(self.victim, self.verb))
    }

    /// A rehearsal, and three deaths.
    pub fn play(self, node: &Node, runtime: Runtime) -> Result {
        let rehearsal = self.with_a_pod(node, runtime, |work, _| {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        })?;
        remove_every_pod(node)?;
        let mut found = false;
        for quarter in 1..=3 {
            found |= self.with_a_pod(node, runtime, |work, death| {
                no_hang(rehearsal * quarter / 4, work, death)
            })?;
            if self.victim == Containerd {
                node.restart_containerd()?;
            }
            remove_every_pod(node)?;
        }
        claim(found, format!("the {:?} was there when it should die", self.victim))?;
        // A shim whose containerd died between its start and the first request ends by itself.
        node.events().bell.until("the end of every shim", FORGOTTEN, || {
            let processes = node.processes();
            let shims = processes
                .iter()
                .filter(|process| process.program().starts_with("containerd-shim-"));
            match shims.count() {
                0 => Ok(()),
                left => Err(format!("{left} of them")),
            }
        })?;
        // Of a pod that nobody remembers, files may be left; the next pod's start finds and removes them.
        node.pod(runtime, "next")?.run()?.remove()
    }

    /// Prepares what the verb needs, and hands out the verb and the death. The death tells whether there was somebody
    /// to die.
    fn with_a_pod<T>(
        self,
        node: &Node,
        runtime: Runtime,
        act: impl FnOnce(&(dyn Fn() -> Result + Sync), &mut dyn FnMut() -> Result<bool>) -> Result<T>,
    ) -> Result<T> {
        let spec = node.pod(runtime, "victim")?;
        let spec = match self.victim {
            Agent => spec.with_host_processes().privileged(),
            _ => spec,
        };
        if self.verb == RunPod {
            let before: Vec<i32> = node.processes().iter().map(|process| process.pid).collect();
            let fresh = || -> Vec<Process> {
                node.processes()
                    .into_iter()
                    .filter(|process| !before.contains(&process.pid))
                    .collect()
            };
            // The pod is removed with every other one.
            let work = || spec.clone().run().map(Pod::leave);
            return act(&work, &mut || self.kill(node, &fresh()));
        }
        let pod = spec.run()?;
        let idle = || pod.container("subject", &["sleep", "infinity"]).memory_mib(128);
        let subject = match self.verb {
            Create => None,
            Start => Some(idle().create()?),
            _ => Some(idle().run()?),
        };
        let mut culprit = match self.victim {
            Agent => Some(armed(&pod)?),
            _ => None,
        };
        let work = || match (self.verb, &subject) {
            (Start, Some(subject)) => subject.start(),
            (Exec, Some(subject)) => subject.shell("head -c 100000 /dev/zero | wc -c").map(drop),
            (Update, Some(subject)) => subject.resize_mib(1024),
            (StopPod, _) => pod.stop(),
            (RemovePod, _) => node.crictl(["rmp", "--force", pod.id()]).map(drop),
            _ => idle().create().map(drop),
        };
        act(&work, &mut || match &mut culprit {
            Some(culprit) => culprit.enter("").map(|()| true),
            None => self.kill(node, &pod.processes()),
        })
    }

    fn kill(self, node: &Node, processes: &[Process]) -> Result<bool> {
        let program = match self.victim {
            Shim => "containerd-shim-",
            Qemu => "qemu-system-",
            Virtiofsd => "virtiofsd",
            Containerd => return node.kill_containerd().map(|()| true),
            Agent => return Err(Failure::Claim("the agent has no process on the node".into())),
        };
        // Early in the making of a pod, or late in its removal, it is not there.
        let Ok(victim) = find(processes, program) else {
            return Ok(false);
        };
        kill_if_there(victim, program)
    }
}

/// A client in the guest that kills the agent when it is given a line.
fn armed(pod: &Pod<'_>) -> Result<Console> {
    let culprit: Container<'_> = pod.container("culprit", &["sleep", "infinity"]).privileged().run()?;
    let script = format!("echo ar\"\"med; read line; {AGENT}");
    let console = culprit.exec_on_terminal(&["sh", "-c", &script])?;
    console.expect("armed")?;
    Ok(console)
}

/// Begins the work, lets the death come at its moment, and measures how long the work goes on after that.
fn no_hang(
    moment: Duration,
    work: &(dyn Fn() -> Result + Sync),
    death: &mut dyn FnMut() -> Result<bool>,
) -> Result<bool> {
    thread::scope(|scope| {
        // How the verb ends is not the point; that it ends is.
        let answered = scope.spawn(|| {
            drop(work());
            Instant::now()
        });
        // Not a wait for something: the moment is what the story varies.
        thread::sleep(moment);
        let died = Instant::now();
        let found = death()?;
        let answered = answered
            .join()
            .map_err(|_| Failure::Claim("the verb panicked".into()))?;
        let took = answered.saturating_duration_since(died);
        claim(
            took <= NO_HANG,
            format!("the verb went on for {took:?} after a death at {moment:?}"),
        )?;
        Ok(found)
    })
}

/// As the kubelet does it: again, until it succeeds. Right after a death containerd may still take a container for
/// running.
fn remove_every_pod(node: &Node) -> Result {
    let remove = || -> Result {
        for pod in node.crictl(["pods", "--quiet"])?.text().lines() {
            node.crictl(["rmp", "--force", pod])?;
        }
        Ok(())
    };
    let bell = &node.events().bell;
    bell.until("the removal of every pod", NO_HANG, || {
        remove().map_err(|failure| failure.to_string())
    })
}
