//! The guest's packet filter, by the programs that the guest's image has for it: ours has none, another's may.
//!
//! As in `get_ip_tables` and `set_ip_tables` of `src/agent/src/rpc.rs` of kata-containers, but IPv6 rules are restored
//! by the program for IPv6.

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
};

use super::{
    error::{Doing, Error, Result},
    reaper::Reaper,
};

/// Where the programs may be.
const FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];
/// For a program's whole life.
const DEADLINE: Duration = Duration::from_secs(10);
/// Seconds that restoring waits for another that holds the filter's lock: as long as upstream's agent lets it.
const LOCK: &str = "5";
/// Bytes of rules that are taken from the host.
const MOST_INPUT: usize = 4 << 20;
/// Bytes of rules that fit an answer (4 MiB to ttrpc).
const MOST_OUTPUT: u64 = 3 << 20;
/// Bytes of what a program says is wrong.
const MOST_ERRORS: u64 = 1 << 10;

/// The rules that there are.
pub(super) async fn save(reaper: &Arc<Reaper>, ipv6: bool) -> Result<Vec<u8>> {
    let name = if ipv6 { "ip6tables-save" } else { "iptables-save" };
    run(reaper, name, &[], &[]).await
}

/// Replaces the rules; what the program prints.
pub(super) async fn restore(reaper: &Arc<Reaper>, ipv6: bool, rules: Vec<u8>) -> Result<Vec<u8>> {
    if rules.len() > MOST_INPUT {
        return Err(Error::Invalid(format!(
            "{} bytes of rules are more than {MOST_INPUT}",
            rules.len()
        )));
    }
    let name = if ipv6 { "ip6tables-restore" } else { "iptables-restore" };
    run(reaper, name, &["--wait", LOCK], &rules).await
}

/// The first program of that name.
fn find(folders: &[&str], name: &str) -> Option<PathBuf> {
    let mut candidates = folders.iter().map(|folder| Path::new(folder).join(name));
    candidates.find(|path| {
        let found = path.metadata();
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

/// Runs a program to its end. Must be called on the thread of the runtime: between its start and the claim nothing is
/// reaped there.
async fn run(reaper: &Arc<Reaper>, name: &'static str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let program = find(&FOLDERS, name).ok_or(Error::NoProgram(name))?;
    let what = || format!("run {}", program.display());
    let expected = reaper.expect();
    let mut command = Command::new(&program);
    command.args(arguments).env_clear();
    // What the program runs itself it looks up.
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().doing(what)?;
    let exit = expected.claim(child.id().cast_signed());
    let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = streams else {
        return Err(io::Error::other("it has no streams")).doing(what);
    };
    let (output, errors) = (reader(stdout.into()), reader(stderr.into()));
    let stdin = pipe::Sender::from_owned_fd(stdin.into()).doing(what)?;
    let (output, errors) = (output.doing(what)?, errors.doing(what)?);
    let talk = async {
        tokio::join!(
            write(stdin, input),
            read(output, MOST_OUTPUT + 1),
            read(errors, MOST_ERRORS),
            exit.wait()
        )
    };
    let Ok((written, output, errors, exited)) = tokio::time::timeout(DEADLINE, talk).await else {
        // It may have ended in this moment.
        let _ = reaper.signal(&exit, libc::SIGKILL);
        return Err(Error::Late(format!("{name} (killed after {DEADLINE:?})")));
    };
    if exited.status != 0 {
        let said = String::from_utf8_lossy(&errors.doing(what)?).trim().replace('\n', "; ");
        let text = format!("it ended with {}: {said}", exited.status);
        return Err(io::Error::other(text)).doing(what);
    }
    written.doing(what)?;
    let output = output.doing(what)?;
    if output.len() as u64 > MOST_OUTPUT {
        return Err(io::Error::other(format!("it printed more than {MOST_OUTPUT} bytes"))).doing(what);
    }
    Ok(output)
}

fn reader(end: OwnedFd) -> io::Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(end)
}

/// All of it; a program that has read enough is none the worse for it.
async fn write(mut stdin: pipe::Sender, input: &[u8]) -> io::Result<()> {
    match stdin.write_all(input).await {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

async fn read(stream: pipe::Receiver, most: u64) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    stream.take(most).read_to_end(&mut data).await?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_first_program_that_can_be_run_is_taken() {
        let (usr, sbin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = [usr.path().to_str().unwrap(), sbin.path().to_str().unwrap()];
        let make = |folder: &tempfile::TempDir, mode| {
            let path = folder.path().join("iptables-save");
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        assert_eq!(find(&folders, "iptables-save"), None);
        let second = make(&sbin, 0o755);
        make(&usr, 0o644);
        assert_eq!(find(&folders, "iptables-save"), Some(second));
        let first = make(&usr, 0o755);
        assert_eq!(find(&folders, "iptables-save"), Some(first));
        assert_eq!(find(&folders, "iptables-restore"), None);
    }

    #[tokio::test]
    async fn more_rules_than_a_message_holds_are_refused() {
        let error = restore(&Arc::default(), false, vec![b'#'; MOST_INPUT + 1])
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Invalid(text) if text == "4194305 bytes of rules are more than 4194304"));
    }
}
