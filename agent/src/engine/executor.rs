//! The last step of a container process: from libcontainer's hands to its program.
//!
//! libcontainer's own executor refuses programs that others may not execute (mode 0750) and processes without
//! `PATH`, shuffles the environment, and keeps Rust's ignored SIGPIPE. Its errors get lost once a container is
//! started. This one says what went wrong on a pipe that closes when the program runs: the *exec status*.

use std::{
    cell::OnceCell,
    collections::HashMap,
    ffi::CString,
    io::Write,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    rc::Rc,
};

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::{
    errno::Errno,
    unistd::{AccessFlags, access, execve},
};
use oci_spec::runtime::{Process, Spec};

use super::{seccomp::Confinement, sys};

#[derive(Clone)]
pub(super) struct Program {
    status: Rc<OwnedFd>,
    confinement: Confinement,
    /// The session keyring of the container's processes.
    keyring: CString,
    path: OnceCell<PathBuf>,
}

impl Program {
    /// `status` is the write end of the exec status pipe.
    pub(super) fn new(container: &str, status: OwnedFd, confinement: Confinement) -> Program {
        Program {
            status: Rc::new(status),
            confinement,
            // The name that runc gives it. A container's id is made of letters.
            keyring: CString::new(format!("_ses.{container}")).unwrap_or_default(),
            path: OnceCell::new(),
        }
    }

    fn report(&self, text: &str) {
        let pipe = self.status.try_clone().map(std::fs::File::from);
        // Whoever reads the pipe sees its end in any case; there is nobody else to tell.
        let _ = pipe.and_then(|mut pipe| pipe.write_all(text.as_bytes()));
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        // libcontainer has just taken the capabilities away.
        let found = self
            .join_keyring()
            .and_then(|()| self.confinement.begin())
            .and_then(|()| find(process_of(spec)?));
        match found {
            Ok(path) => {
                let _ = self.path.set(path);
                Ok(())
            }
            Err(text) => {
                self.report(&text);
                Err(ExecutorValidationError::ArgValidationError(text))
            }
        }
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(()) // The environment goes to `execve`, in its order.
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(text) = self.run(spec);
        self.report(&text);
        Err(ExecutorError::Other(text))
    }
}

impl Program {
    /// Else all containers had the session keyring of the agent, and each other's keys.
    fn join_keyring(&self) -> Result<(), String> {
        match sys::join_session_keyring(&self.keyring) {
            // A kernel without keys.
            Ok(()) | Err(Errno::ENOSYS) => Ok(()),
            Err(error) => Err(format!("joining the session keyring: {}", error.desc())),
        }
    }

    fn run(&self, spec: &Spec) -> Result<std::convert::Infallible, String> {
        let process = process_of(spec)?;
        let path = self.path.get().ok_or("the program was not looked up")?;
        let strings = |list: &Option<Vec<String>>| {
            let list = list.iter().flatten();
            list.map(|s| CString::new(s.as_str())).collect::<Result<Vec<_>, _>>()
        };
        let (args, env) = strings(process.args())
            .and_then(|args| Ok((args, strings(process.env())?)))
            .map_err(|_| "the command or its environment contains a NUL byte")?;
        let program = CString::new(path.as_os_str().as_bytes()).map_err(|_| "the command contains a NUL byte")?;
        sys::default_signals().map_err(|e| format!("resetting signals: {}", e.desc()))?;
        self.confinement.finish()?;
        execve(&program, &args, &env).map_err(|e| format!("exec: {:?}: {}", path.display(), text(e)))
    }
}

fn process_of(spec: &Spec) -> Result<&Process, String> {
    spec.process()
        .as_ref()
        .ok_or_else(|| "the specification has no process".to_owned())
}

/// Finds the program as a shell would. Called in the container, with the rights of its user.
///
/// The texts are those of runc, which the tests of Kubernetes and of the CRI look for.
fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .ok_or("the command is empty")?;
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match executable(&path) {
            Err(e @ (Errno::ENOENT | Errno::ENOTDIR)) => Err(format!("exec: {name:?}: stat {name}: {}", text(e))),
            Err(e @ (Errno::EACCES | Errno::EISDIR)) => Err(format!("exec: {name:?}: {}", text(e))),
            // Seccomp may forbid to look; `execve` will tell.
            Ok(()) | Err(_) => Ok(path),
        };
    }
    let env = process.env().as_deref().unwrap_or_default();
    let search = env
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut refused = None;
    for folder in search.split(':') {
        let path = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(Errno::EACCES) => refused = Some(path),
            Err(_) => {}
        }
    }
    Err(match refused {
        Some(path) => format!("exec: {:?}: {}", path.display(), text(Errno::EACCES)),
        None => format!("exec: {name:?}: executable file not found in $PATH"),
    })
}

fn executable(path: &Path) -> Result<(), Errno> {
    access(path, AccessFlags::X_OK)?;
    let found = nix::sys::stat::stat(path)?;
    if found.st_mode & libc::S_IFMT == libc::S_IFDIR {
        Err(Errno::EISDIR)
    } else {
        Ok(())
    }
}

fn text(errno: Errno) -> String {
    errno.desc().to_lowercase()
}
