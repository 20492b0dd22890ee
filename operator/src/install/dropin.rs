//! The files that tell the CRI, and the shim, of the handler and of the log level: which there should be, and with
//! which text.

use std::path::{Path, PathBuf};

use super::cri::Kind;
use crate::log_level::LogLevel;

/// What the first line of each of our files begins with.
pub const MARK: &str = "# Sandpod: ";
/// Where the packages, and the payload's own files, expect the installation.
pub const DEFAULT_PREFIX: &str = "/opt/sandpod";
/// The administrator's folder of the shim's configuration.
pub const CONFIG_FOLDER: &str = "/etc/sandpod/config.d";

const CRIO: &str = include_str!("../../../deploy/cri/50-kata.crio.conf");
const CONTAINERD: &str = include_str!("../../../deploy/cri/50-kata.containerd-2.toml");

/// One file that there should be, or should not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropIn {
    /// As the node sees it.
    pub path: PathBuf,
    /// Its text; none where there should be no such file.
    pub text: Option<String>,
    /// Where it is written before it is moved to its place: its reader reads all files of its own folder, whatever
    /// their names.
    pub scratch: PathBuf,
    /// The CRI reads it, and only when it starts.
    pub of_cri: bool,
}

/// The drop-in that defines the handler.
#[must_use]
pub fn handler(kind: Kind, prefix: &Path) -> DropIn {
    let (path, text) = match kind {
        Kind::Crio => ("/etc/crio/crio.conf.d/50-kata", at_prefix(CRIO, prefix)),
        Kind::Containerd => ("/etc/containerd/conf.d/50-kata.toml", containerd(prefix)),
    };
    of_cri(kind, path, Some(text))
}

/// Every file of ours outside the prefix.
#[must_use]
pub fn all(kind: Kind, prefix: &Path, level: LogLevel) -> Vec<DropIn> {
    let mut files = vec![handler(kind, prefix)];
    // containerd's level is that of its service; the shim has its own.
    if kind == Kind::Crio {
        let text =
            format!("{MARK}the log level of the cluster's KataConfig.\n[crio.runtime]\nlog_level = \"{level}\"\n");
        let text = (level != LogLevel::Info).then_some(text);
        files.push(of_cri(kind, "/etc/crio/crio.conf.d/51-kata-log-level", text));
    }
    let debug = matches!(level, LogLevel::Debug | LogLevel::Trace);
    files.push(DropIn {
        path: Path::new(CONFIG_FOLDER).join("00-log-level.toml"),
        text: debug.then(|| {
            format!("{MARK}pods that start from now on log everything; a later file may say otherwise.\n[runtime]\nenable_debug = true\n")
        }),
        // Only files that end with .toml are read there.
        scratch: CONFIG_FOLDER.into(),
        of_cri: false,
    });
    files
}

fn of_cri(kind: Kind, path: &str, text: Option<String>) -> DropIn {
    DropIn {
        path: path.into(),
        text,
        scratch: match kind {
            Kind::Crio => "/etc/crio",
            Kind::Containerd => "/etc/containerd",
        }
        .into(),
        of_cri: true,
    }
}

/// The prefix that a drop-in of ours goes through, if it is one and names one.
#[must_use]
pub fn prefix_of(text: &str) -> Option<PathBuf> {
    let words = text.starts_with(MARK).then(|| text.lines())?;
    let mut paths = words.filter_map(|line| line.strip_prefix("runtime_path = \"")?.strip_suffix('"'));
    paths
        .next()?
        .strip_suffix("/current/bin/containerd-shim-kata-v2")
        .map(PathBuf::from)
}

/// A text of ours with its paths below another prefix.
#[must_use]
pub fn at_prefix(text: &str, prefix: &Path) -> String {
    let current = format!("{}/current", prefix.display());
    text.replace(&format!("{DEFAULT_PREFIX}/current"), &current)
}

/// The shim looks for its configuration below the default prefix only; elsewhere the handler has to name it, and loses
/// what the text's last comment says.
fn containerd(prefix: &Path) -> String {
    let text = at_prefix(CONTAINERD, prefix);
    if prefix == Path::new(DEFAULT_PREFIX) {
        return text;
    }
    let (head, _) = text.split_once("# No options").unwrap_or((&text, ""));
    let prefix = prefix.display();
    format!(
        "{head}\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata.options]\n\
         ConfigPath = \"{prefix}/current/configuration.toml\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use toml::{Table, Value};

    fn at<'t>(table: &'t Table, keys: &[&str]) -> Option<&'t Value> {
        let (last, sections) = keys.split_last()?;
        let section = sections
            .iter()
            .try_fold(table, |table, key| table.get(*key)?.as_table());
        section?.get(*last)
    }

    #[test]
    fn crios_handler_has_the_keys_that_a_vm_needs() {
        let file = handler(Kind::Crio, Path::new("/opt/sandpod"));
        assert_eq!(file.path, Path::new("/etc/crio/crio.conf.d/50-kata"));
        let text = file.text.unwrap();
        assert!(text.starts_with(MARK));
        let table: Table = text.parse().unwrap();
        let key = |name| at(&table, &["crio", "runtime", "runtimes", "kata", name]).cloned();
        assert_eq!(
            key("runtime_path"),
            Some("/opt/sandpod/current/bin/containerd-shim-kata-v2".into())
        );
        assert_eq!(key("runtime_type"), Some("vm".into()));
        assert_eq!(key("runtime_root"), Some("/run/vc".into()));
        assert_eq!(
            key("runtime_config_path"),
            Some("/opt/sandpod/current/configuration.toml".into())
        );
        assert_eq!(key("privileged_without_host_devices"), Some(false.into()));
        assert_eq!(key("allowed_annotations"), None);
    }

    #[test]
    fn containerds_handler_names_its_configuration_only_where_the_shim_would_not_find_it() {
        let runtime = |prefix: &str| {
            let table: Table = handler(Kind::Containerd, Path::new(prefix))
                .text
                .unwrap()
                .parse()
                .unwrap();
            let keys = [
                "plugins",
                "io.containerd.cri.v1.runtime",
                "containerd",
                "runtimes",
                "kata",
            ];
            at(&table, &keys).unwrap().as_table().unwrap().clone()
        };
        let usual = runtime("/opt/sandpod");
        assert_eq!(
            usual["runtime_path"],
            "/opt/sandpod/current/bin/containerd-shim-kata-v2".into()
        );
        assert_eq!(usual.get("options"), None);
        let moved = runtime("/var/lib/sandpod");
        assert_eq!(
            moved["runtime_path"],
            "/var/lib/sandpod/current/bin/containerd-shim-kata-v2".into()
        );
        assert_eq!(
            moved["options"]["ConfigPath"],
            "/var/lib/sandpod/current/configuration.toml".into()
        );
    }

    #[test]
    fn a_drop_in_tells_its_prefix() {
        for kind in [Kind::Crio, Kind::Containerd] {
            for prefix in ["/opt/sandpod", "/var/lib/sandpod"] {
                let text = handler(kind, Path::new(prefix)).text.unwrap();
                assert_eq!(prefix_of(&text), Some(prefix.into()));
                assert_eq!(prefix_of(&text.replace(MARK, "# ")), None);
            }
        }
        assert_eq!(prefix_of("# Sandpod: edited\n"), None);
    }

    #[test]
    fn a_log_level_is_for_crio_and_a_verbose_one_for_the_shim() {
        let texts = |kind, level| -> Vec<_> {
            let files = all(kind, Path::new("/opt/sandpod"), level).into_iter().skip(1);
            files
                .map(|file| file.text.map(|text| text.lines().skip(1).collect::<Vec<_>>().join(";")))
                .collect()
        };
        let crio = |level: &str| Some(format!("[crio.runtime];log_level = \"{level}\""));
        let shim = || Some("[runtime];enable_debug = true".to_owned());
        assert_eq!(texts(Kind::Crio, LogLevel::Info), [None, None]);
        assert_eq!(texts(Kind::Crio, LogLevel::Warn), [crio("warn"), None]);
        assert_eq!(texts(Kind::Crio, LogLevel::Debug), [crio("debug"), shim()]);
        assert_eq!(texts(Kind::Containerd, LogLevel::Trace), [shim()]);
    }

    #[test]
    fn nothing_is_written_first_where_its_reader_would_read_it() {
        for kind in [Kind::Crio, Kind::Containerd] {
            for file in all(kind, Path::new("/opt/sandpod"), LogLevel::Debug) {
                assert!(
                    !file.of_cri || Some(file.scratch.as_path()) != file.path.parent(),
                    "{}",
                    file.path.display()
                );
            }
        }
    }
}
