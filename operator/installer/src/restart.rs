//! The restart of the CRI: the one thing that the installer does to programs of others.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::{process::Command, time::timeout};

use super::{
    cri::Cri,
    error::{Context, InstallError, Result},
};

/// systemd gives up starting a service after 90 s by default, and stopping it after as long.
const PATIENCE: Duration = Duration::from_secs(200);

/// Where an administrator's shell would look for the command.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Restarts the CRI by this command, or by systemd, and waits until it answers.
///
/// # Errors
/// The command fails, or the CRI does not come back.
pub fn restart(cri: &Cri, command: Option<&[String]>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .action("start the runtime")?;
    let by_systemd;
    let words = match command.filter(|words| !words.is_empty()) {
        Some(words) => words,
        None => {
            let unit = unit(cri.daemon.site().units, |unit| runtime.block_on(is_active(unit)));
            by_systemd = ["systemctl", "restart", unit].map(str::to_owned);
            &by_systemd
        }
    };
    let failed = |how: String| InstallError::Restart {
        command: words.join(" "),
        how,
        cri: cri.daemon.name(),
    };
    let said = Said::new().action("make a file in memory")?;
    let output = said.for_command().action("share a file in memory")?;
    let status = runtime.block_on(async { timeout(PATIENCE, command_of(words, output).status()).await });
    let said = said.last_line();
    match ended(status.ok(), said.as_deref()) {
        Ok(()) => cri.await_comeback(),
        Err(how) => Err(failed(how)),
    }
}

/// The unit that runs now, or else the usual one: a node is a server or an agent of its distribution.
fn unit<'u>(units: &[&'u str], mut is_active: impl FnMut(&str) -> bool) -> &'u str {
    match units {
        [] => "",
        [only] => only,
        [usual, ..] => units.iter().copied().find(|unit| is_active(unit)).unwrap_or(usual),
    }
}

/// Whether a unit of systemd is active. A systemctl that is not there or does not end says so at the restart.
async fn is_active(unit: &str) -> bool {
    let words = ["systemctl", "is-active", "--quiet", unit].map(str::to_owned);
    let asked = timeout(PATIENCE, command_of(&words, Stdio::null()).status()).await;
    matches!(asked, Ok(Ok(status)) if status.success())
}

fn command_of(words: &[String], output: Stdio) -> Command {
    let path = std::env::var("PATH").map_or_else(|_| PATH.to_owned(), |path| format!("{path}:{PATH}"));
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .env("PATH", path)
        // systemctl does nothing in another root, and says so only to people; here that root is the node's own.
        .env("SYSTEMD_IGNORE_CHROOT", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .kill_on_drop(true);
    command
}

/// How the command has ended, unless it has done its work; none when it had not ended in time.
fn ended(status: Option<io::Result<ExitStatus>>, said: Option<&str>) -> std::result::Result<(), String> {
    let how = match status {
        Some(Ok(status)) if status.success() => return Ok(()),
        Some(Ok(status)) => format!("ended with {status}"),
        Some(Err(error)) => format!("cannot be started: {error}"),
        None => format!("did not end within {PATIENCE:?}"),
    };
    Err(said.map_or_else(|| how.clone(), |said| format!("{how} and said {said:?}")))
}

/// What a command says on its standard error: a file in memory, not a pipe. A daemon that the command leaves behind has
/// it still, and must neither be waited for nor be killed by what it writes.
struct Said(File);

impl Said {
    /// As much of a line as a sentence can hold, in bytes.
    const LONGEST: u64 = 300;

    fn new() -> nix::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        Ok(Self(memfd_create("said", flags)?.into()))
    }

    fn for_command(&self) -> io::Result<Stdio> {
        Ok(self.0.try_clone()?.into())
    }

    /// The last line that was written, if any; nothing more can be written from then on.
    fn last_line(self) -> Option<String> {
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW;
        // One that cannot be sealed is read as it is.
        let _ = fcntl(&self.0, FcntlArg::F_ADD_SEALS(seals));
        let length = self.0.metadata().ok()?.len();
        let mut bytes = vec![0; usize::try_from(length.min(Self::LONGEST)).ok()?];
        self.0
            .read_exact_at(&mut bytes, length.saturating_sub(Self::LONGEST))
            .ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        line.map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_that_runs_is_restarted() {
        let units = ["k3s", "k3s-agent"];
        assert_eq!(unit(&units, |unit| unit == "k3s-agent"), "k3s-agent");
        assert_eq!(unit(&units, |_| true), "k3s");
        assert_eq!(unit(&units, |_| false), "k3s");
        // Nothing has to be asked where there is no choice.
        assert_eq!(unit(&["containerd"], |_| panic!("asked")), "containerd");
    }

    /// Runs a script as a restart command. What is said of it.
    fn told(script: &str) -> std::result::Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let said = Said::new().unwrap();
        let output = said.for_command().unwrap();
        let words = ["sh", "-c", script].map(str::to_owned);
        let status = runtime.block_on(async { command_of(&words, output).status().await });
        ended(Some(status), said.last_line().as_deref())
    }

    #[test]
    fn a_restart_that_fails_is_told_with_its_last_words() {
        assert_eq!(told("echo a warning >&2"), Ok(()));
        let how = told("echo first >&2; echo 'Unit crio.service not found.' >&2; echo >&2; exit 5").unwrap_err();
        assert_eq!(
            how,
            "ended with exit status: 5 and said \"Unit crio.service not found.\""
        );
        assert_eq!(told("exit 1").unwrap_err(), "ended with exit status: 1");
        let long = told("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1").unwrap_err();
        assert!(long.len() < 400, "{long}");
    }

    #[test]
    fn a_daemon_that_a_restart_leaves_behind_is_not_waited_for_and_lives() {
        let folder = tempfile::tempdir().unwrap();
        let (go, done) = (folder.path().join("go"), folder.path().join("done"));
        for fifo in [&go, &done] {
            nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        let (at_go, at_done) = (go.display(), done.display());
        let daemon = format!("(read -r _ <{at_go}; echo late >&2; echo lives >{at_done}) &\n exit 0");
        assert_eq!(told(&daemon), Ok(()));
        std::fs::write(&go, "\n").unwrap();
        assert_eq!(std::fs::read_to_string(&done).unwrap(), "lives\n");
    }
}
