//! `kata-ctl gather`: what a bug report needs, in one archive. Nothing of what runs in the containers: no
//! specification, no environment, no output.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use config::Config;
use flate2::{Compression, write::GzEncoder};
use nix::errno::Errno;

use super::{env::Env, list, sandboxes, top};
use crate::{
    check,
    error::{Context, Result},
    http, metrics,
    trace::Trace,
    undo::dir_of,
};

/// How long a shim may take for one answer.
const SHIM: Duration = Duration::from_secs(10);
/// The most lines of a log.
const LINES: usize = 5000;
/// What marks a line of the host's kernel log as of interest.
const KERNEL_WORDS: &[&str] = &[
    "kvm",
    "qemu",
    "virtiofsd",
    "kata",
    "vhost",
    "oom",
    "Out of memory",
    "segfault",
];

/// Writes the archive, a gzipped tar for root's eyes, `-` for the standard output; returns the names of what is in it,
/// a line each.
///
/// # Errors
/// The file cannot be written. What cannot be gathered is in the archive as the sentence that says why.
pub async fn gather(output: &Path) -> Result<String> {
    let file = open(output).at("create", output)?;
    let mut archive = Archive {
        tar: tar::Builder::new(GzEncoder::new(file, Compression::default())),
        names: String::new(),
    };
    let config = Config::load(None);
    let of_config = |what: &dyn Fn(&Config) -> Result<String>| match &config {
        Ok(config) => what(config),
        Err(error) => Ok(format!("{error}\n")),
    };
    archive
        .add("env.toml", of_config(&|config| Env::of(config)?.toml()))
        .at("write", output)?;
    let findings = |config: &Config| {
        Ok(check::check(config)
            .iter()
            .map(|finding| format!("{finding}\n"))
            .collect())
    };
    archive.add("check.txt", of_config(&findings)).at("write", output)?;
    archive
        .add("config.txt", of_config(&|config| Ok(config.explain())))
        .at("write", output)?;
    archive.add("list.txt", list()).at("write", output)?;
    archive
        .add("top.txt", top::measure().await.map(|usages| top::render(&usages)))
        .at("write", output)?;
    for (id, _) in sandboxes().unwrap_or_default() {
        for (name, text) in of_sandbox(&id).await {
            archive
                .add(&format!("sandboxes/{id}/{name}"), text)
                .at("write", output)?;
        }
    }
    archive.add("journal.txt", journal()).at("write", output)?;
    archive.add("kernel.txt", kernel()).at("write", output)?;
    archive.finish().at("write", output)
}

fn open(output: &Path) -> io::Result<File> {
    if output == Path::new("-") {
        return Ok(io::stdout().as_fd().try_clone_to_owned()?.into());
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(output)
}

async fn of_sandbox(id: &str) -> [(&'static str, Result<String>); 4] {
    let state = dir_of(id).join("state.json");
    let socket = metrics::socket(id);
    [
        ("state.json", std::fs::read_to_string(&state).at("read", &state)),
        ("trace.txt", Trace::load(id).map(|trace| trace.render())),
        (
            "metrics.txt",
            http::get(&socket, "/metrics", SHIM).await.at("ask", &socket),
        ),
        (
            "containers.json",
            http::get(&socket, "/containers", SHIM).await.at("ask", &socket),
        ),
    ]
}

/// What shims said by way of their CRI's log, and nothing else of it: a CRI at its debug level writes whole requests.
fn journal() -> Result<String> {
    let mut command = Command::new("journalctl");
    command.args([
        "--no-pager",
        "--output=short-iso",
        "--since=-24h",
        "--unit=containerd",
        "--unit=crio",
    ]);
    lines_of(command, |line| line.contains("kata["))
}

fn kernel() -> Result<String> {
    lines_of(Command::new("dmesg"), |line| {
        KERNEL_WORDS.iter().any(|word| line.contains(word))
    })
}

/// The last lines of a program's output that are wanted.
fn lines_of(mut command: Command, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let output = command.output().at("run", command.get_program())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let wanted: Vec<&str> = text.lines().filter(|line| wanted(line)).collect();
    let last = &wanted[wanted.len().saturating_sub(LINES)..];
    let errors = String::from_utf8_lossy(&output.stderr);
    Ok(last.iter().map(|line| format!("{line}\n")).collect::<String>() + &errors)
}

/// An archive that is being written.
struct Archive {
    tar: tar::Builder<GzEncoder<File>>,
    names: String,
}

impl Archive {
    fn add(&mut self, name: &str, text: Result<String>) -> io::Result<()> {
        let text = text.unwrap_or_else(|error| format!("{error}\n"));
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        header.set_mtime(now.as_secs());
        self.names += &format!("{name}\n");
        self.tar
            .append_data(&mut header, format!("kata-gather/{name}"), text.as_bytes())
    }

    fn finish(self) -> io::Result<String> {
        match self.tar.into_inner()?.finish()?.sync_all() {
            // A pipe has nothing that could be brought to a disk.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {}
            synced => synced?,
        }
        Ok(self.names)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[tokio::test]
    async fn an_archive_has_every_part_on_any_node() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("report.tar.gz");
        let names = gather(&file).await.unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&file).unwrap()));
        let mut found = String::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            if path == "kata-gather/check.txt" {
                assert!(text.contains(" host kernel "), "{text}");
            }
            found += &format!("{}\n", path.trim_start_matches("kata-gather/"));
        }
        assert_eq!(found, names);
        for name in [
            "env.toml",
            "check.txt",
            "config.txt",
            "list.txt",
            "top.txt",
            "journal.txt",
            "kernel.txt",
        ] {
            assert!(names.lines().any(|found| found == name), "{name} in {names}");
        }
    }
}
