//! The restart of the CRI: the one thing that the installer does to programs of others.

use std::{process::Stdio, time::Duration};

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
    let by_systemd = ["systemctl", "restart", cri.kind.unit()].map(str::to_owned);
    let words = command.filter(|words| !words.is_empty()).unwrap_or(&by_systemd);
    let failed = |how: String| InstallError::Restart {
        command: words.join(" "),
        how,
        cri: cri.kind.name(),
    };
    let path = std::env::var("PATH").map_or_else(|_| PATH.to_owned(), |path| format!("{path}:{PATH}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .action("start the runtime")?;
    let status = runtime.block_on(async {
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env("PATH", path)
            // systemctl does nothing in another root, and says so only to people; here that root is the node's own.
            .env("SYSTEMD_IGNORE_CHROOT", "1")
            .kill_on_drop(true);
        // A daemon that the command leaves behind keeps what it inherits: nothing of ours.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        timeout(PATIENCE, command.status()).await
    });
    match status {
        Ok(Ok(status)) if status.success() => cri.await_comeback(),
        Ok(Ok(status)) => Err(failed(format!("ended with {status}"))),
        Ok(Err(error)) => Err(failed(format!("cannot be started: {error}"))),
        Err(_) => Err(failed(format!("did not end within {PATIENCE:?}"))),
    }
}
