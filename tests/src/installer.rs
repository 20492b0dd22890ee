//! The installer on a node, with the node's own containerd to restart.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use installer_report::Report;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};

use crate::{
    failure::{Failure, Result, Trying, claim},
    node::Node,
    places, procs,
    run::{self, Output},
    tree::Tree,
};

/// How long the installer may take: it writes and hashes some 100 MiB, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// Restarts containerd as a service manager would: it asks the harness, waits, and tells how it went.
const RESTART: &str =
    "#!/bin/sh\necho restart >\"$0.request\" && read answer <\"$0.answer\" && [ \"$answer\" = done ]\n";

/// The installer of a node.
pub struct Installer<'n> {
    node: &'n Node,
    restarts: AtomicUsize,
}

impl Node {
    /// Plays with an installer, which can restart this node's containerd meanwhile.
    ///
    /// # Errors
    /// Those of the play.
    pub fn with_installer(&self, play: impl FnOnce(&Installer) -> Result) -> Result {
        let installer = Installer {
            node: self,
            restarts: AtomicUsize::new(0),
        };
        let script = installer.restart_command();
        self.write(&script, RESTART)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).trying("making the restart a program")?;
        for fifo in ["request", "answer"] {
            let path = script.with_extension(fifo);
            drop(fs::remove_file(&path));
            mkfifo(&path, Mode::S_IRWXU).trying("making a pipe for restarts")?;
        }
        thread::scope(|scope| {
            let server = scope.spawn(|| installer.serve_restarts());
            let played = play(&installer);
            let told = fs::write(script.with_extension("request"), "end\n").trying("ending the restarts");
            let served = server
                .join()
                .unwrap_or_else(|_| Err(Failure::Claim("the thread of restarts panicked".into())));
            played.and(told).and(served)
        })
    }
}

impl Node {
    /// Everything where an installer may write.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tree(&self) -> Result<Tree> {
        let folders = ["/etc", "/opt", "/run/sandpod", "/var/lib/sandpod", "/var/lib/rancher"];
        Tree::of(&folders.map(|folder| self.inside(folder)))
    }
}

impl Installer<'_> {
    fn serve_restarts(&self) -> Result {
        let script = self.restart_command();
        // Open for both directions, so that neither an asker who has died blocks it nor an answer to him stays for the
        // next one.
        let mut answers = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(script.with_extension("answer"))
            .trying("opening the pipe for answers")?;
        loop {
            let asked = fs::read_to_string(script.with_extension("request")).trying("waiting for a restart")?;
            if asked.contains("end") {
                return Ok(());
            }
            self.restarts.fetch_add(1, Ordering::SeqCst);
            let answer = match self.node.restart_containerd() {
                Ok(()) => "done\n",
                Err(_) => "failed\n",
            };
            // Empty when the last one was heard.
            let _ = answers.read(&mut [0; 64]);
            answers.write_all(answer.as_bytes()).trying("answering a restart")?;
        }
    }

    /// The program that restarts this node's containerd.
    #[must_use]
    pub fn restart_command(&self) -> PathBuf {
        self.node.path("restart")
    }

    /// How often containerd was restarted so far.
    #[must_use]
    pub fn restarts(&self) -> usize {
        self.restarts.load(Ordering::SeqCst)
    }

    /// Runs `install.sh` on the node, with what lies beside it in a release; it must succeed.
    ///
    /// # Errors
    /// What it said when it failed.
    pub fn script(&self, arguments: &[&str]) -> Result<Output> {
        let release = self.node.path(&format!("release-{}", self.node.serial()));
        let script = release.join("install.sh");
        let (program, payload) = (places::binaries()?.join("sandpod-installer"), places::payload()?);
        fs::create_dir(&release)
            .and_then(|()| fs::copy(places::workspace().join("deploy/install.sh"), &script))
            .and_then(|_| symlink(program, release.join("sandpod-installer")))
            .and_then(|()| symlink(payload, release.join("payload")))
            .trying("laying out a release")?;
        let mut command = self.node.command(&script.display().to_string());
        command
            .args(arguments)
            .arg("--restart-command")
            .arg(self.restart_command());
        run::succeed(&mut command, DEADLINE)
    }

    /// Runs the installer on the node, and returns its report, whatever it says.
    ///
    /// # Errors
    /// When it leaves none.
    pub fn run(&self, arguments: &[&str]) -> Result<Report> {
        let mut command = self.command(arguments)?;
        let output = run::finish(&mut command, None, DEADLINE)?;
        let report =
            Report::parse(&output.text()).map_err(|error| Failure::Claim(format!("{error}; {}", output.errors())))?;
        claim(
            (output.code == 0) == report.error.is_none(),
            format!("exit code {} goes not with {report:?}", output.code),
        )?;
        Ok(report)
    }

    /// Runs the installer as in a pod: in the machine's own namespaces, with the node's root below another folder, and
    /// the report in a file.
    ///
    /// # Errors
    /// When it leaves none.
    pub fn run_from_outside(&self, arguments: &[&str]) -> Result<Report> {
        let result = self.node.path("termination-log");
        let mut command = Command::new(places::binaries()?.join("sandpod-installer"));
        command.args(arguments).arg("--host-root").arg(self.node.inside("/"));
        command
            .arg("--restart-command")
            .arg(self.restart_command())
            .arg("--result")
            .arg(&result);
        run::finish(&mut command, None, DEADLINE)?;
        let text = fs::read_to_string(&result).trying("reading the report")?;
        Report::parse(&text).map_err(|error| Failure::Claim(error.to_string()))
    }

    /// As [`Installer::run`]; it must succeed.
    ///
    /// # Errors
    /// The report's.
    pub fn succeed(&self, arguments: &[&str]) -> Result<Report> {
        let report = self.run(arguments)?;
        match &report.error {
            None => Ok(report),
            Some(problem) => Err(Failure::Claim(format!("`{arguments:?}` failed: {}", problem.text))),
        }
    }

    /// Runs the installer and kills it at the line of its step number `at`, from 0 on. The line; none when it ended
    /// before.
    ///
    /// # Errors
    /// When it cannot be started or killed.
    pub fn kill_at(&self, at: usize, arguments: &[&str]) -> Result<Option<String>> {
        let mut command = self.command(arguments)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().trying("starting the installer")?;
        let said = child
            .stderr
            .take()
            .ok_or_else(|| Failure::Claim("the installer has no standard error".into()))?;
        let mut steps = 0;
        let line = run::await_line(said, DEADLINE, move |line| {
            steps += usize::from(line.starts_with("installer: "));
            steps > at
        });
        if !matches!(line, Ok(None)) {
            end(&child)?;
        }
        run::wait(child, DEADLINE, "the installer")?;
        self.await_quiet()?;
        line
    }

    /// Runs the installer and kills it after some time, unless it has ended by then.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn kill_after(&self, moment: Duration, arguments: &[&str]) -> Result {
        let program = self.command(arguments)?;
        let words: Vec<_> = program.get_args().skip_while(|word| *word != "--").skip(1).collect();
        let mut command = self.node.command("timeout");
        command
            .args(["--foreground", "--signal", "KILL", &moment.as_secs_f64().to_string()])
            .args(words);
        run::finish(&mut command, None, DEADLINE)?;
        self.await_quiet()
    }

    /// A service manager goes on with a restart whose client has died.
    fn await_quiet(&self) -> Result {
        let script = self.restart_command().display().to_string();
        let restarts = |process: &procs::Process| process.arguments.contains(&script);
        self.node
            .events()
            .bell
            .until("the end of a restart", run::ORDINARY, || {
                match self.node.processes().into_iter().find(restarts) {
                    None => Ok(()),
                    Some(process) => Err(format!("{process:?}")),
                }
            })
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let program = places::binaries()?.join("sandpod-installer");
        let mut command = self.node.command(&program.display().to_string());
        command.args(arguments);
        if !arguments.contains(&"--restart-command") {
            command.arg("--restart-command").arg(self.restart_command());
        }
        Ok(command)
    }

    /// What is on the node where the installer may write.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tree(&self) -> Result<Tree> {
        self.node.tree()
    }

    /// A payload of another version with the same files, or with those of them that `keep` wants.
    ///
    /// # Errors
    /// When there is no payload, and the kernel's.
    pub fn payload(&self, version: &str, keep: impl Fn(&str) -> bool) -> Result<String> {
        let to = self.node.path(&format!("payload-{version}-{}", self.node.serial()));
        other_payload(&to, version, keep)?;
        Ok(to.display().to_string())
    }
}

/// Makes a payload of a version with the files of the one that was built, or with those of them that `keep` wants.
///
/// # Errors
/// When there is no payload, and the kernel's.
pub fn other_payload(to: &Path, version: &str, keep: impl Fn(&str) -> bool) -> Result {
    let from = places::payload()?;
    let manifest = fs::read_to_string(from.join("MANIFEST")).trying("reading the payload's manifest")?;
    let mut text = format!("sandpod {version}\n");
    for line in manifest.lines().skip(1) {
        let path = line.rsplit(' ').next().unwrap_or_default();
        if !keep(path) {
            continue;
        }
        text += &format!("{line}\n");
        let place = to.join(path);
        let copied = place
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            // Another name is quicker than a copy, and the same unless it is on another file system.
            .and_then(|()| {
                fs::hard_link(from.join(path), &place).or_else(|_| fs::copy(from.join(path), &place).map(drop))
            });
        copied.trying(format!("copying {path}"))?;
    }
    fs::write(to.join("MANIFEST"), text).trying("writing a payload's manifest")
}

/// Kills the program of a node's command: `nsenter` runs it as its child.
///
/// # Errors
/// The kernel's.
pub fn end(nsenter: &Child) -> Result {
    let parent = nsenter.id().cast_signed();
    let program = procs::all().into_iter().find(|process| process.parent == parent);
    match program.map(|program| kill(Pid::from_raw(program.pid), Signal::SIGKILL)) {
        // It has ended by itself meanwhile.
        None | Some(Ok(()) | Err(Errno::ESRCH)) => Ok(()),
        Some(Err(error)) => Err(error).trying("killing a program of the node"),
    }
}
