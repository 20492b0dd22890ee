//! The files that tell the CRI, and the shim, of the handler and of the log level: which there should be, and with
//! which text.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{
    classes,
    cri::HANDLER,
    daemon::{Daemon, Folder, Kind},
};
use crate::log_level::LogLevel;
pub use crate::report::DEFAULT_PREFIX;

/// What the first line of each of our files begins with.
pub const MARK: &str = "# Sandpod: ";
/// The administrator's folder of the shim's configuration.
pub const CONFIG_FOLDER: &str = "/etc/sandpod/config.d";

/// The shim's file where everything is logged.
const VERBOSE: &str = "# Sandpod: pods that start from now on log everything; a later file may say otherwise.\n\
                       [runtime]\nenable_debug = true\n";
const CRIO: &str = include_str!("../../../deploy/cri/50-kata.crio.conf");
const CONTAINERD: &str = include_str!("../../../deploy/cri/50-kata.containerd-2.toml");

/// How the CRI's configuration names a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// CRI-O's.
    Crio,
    /// containerd's with `version = 2`, in which one plugin is the whole CRI.
    ContainerdV2,
    /// containerd's with `version = 3` or a later one, in which the CRI's runtimes are a plugin of their own.
    ContainerdV3,
}

/// Where one of our files outside the prefix belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As the node sees it.
    pub path: Cow<'static, str>,
    /// The folder where it is written before it is moved to its place: its reader reads all files of its own folder,
    /// whatever their names.
    pub scratch: &'static str,
    /// The CRI reads it, and only when it starts.
    pub of_cri: bool,
}

/// One file that there should be, or should not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropIn {
    /// Where it is.
    pub place: Place,
    /// Its text; none where there should be no such file.
    pub text: Option<String>,
}

const CRIO_LOG_LEVEL: Place = Place {
    path: Cow::Borrowed("/etc/crio/crio.conf.d/51-kata-log-level"),
    scratch: "/etc/crio",
    of_cri: true,
};

const SHIM_LOG_LEVEL: Place = Place {
    path: Cow::Borrowed("/etc/sandpod/config.d/00-log-level.toml"),
    // Only files that end with .toml are read there.
    scratch: CONFIG_FOLDER,
    of_cri: false,
};

const SHIM_CONFIGURATION: Place = Place {
    // Before what a node's own administrator has there, who has the last word.
    path: Cow::Borrowed("/etc/sandpod/config.d/01-kataconfig.toml"),
    scratch: CONFIG_FOLDER,
    of_cri: false,
};

/// The name of the file with the KataConfig's own configuration of pods, in [`CONFIG_FOLDER`].
pub const CONFIGURATION_NAME: &str = "01-kataconfig.toml";

/// What the files outside the prefix are to say.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'w> {
    /// Where the installation is.
    pub prefix: &'w Path,
    /// How much is logged.
    pub level: LogLevel,
    /// TOML of the KataConfig's, or empty.
    pub configuration: &'w str,
    /// The files of the RuntimeClasses with settings of their own.
    pub classes: &'w classes::Files,
}

/// Where every file of ours outside the prefix belongs, whether there should be one or not; but for those of
/// RuntimeClasses.
#[must_use]
pub fn places(daemon: Daemon) -> Vec<Place> {
    let folders = daemon.site().folders.iter();
    let mut places: Vec<_> = folders.map(|folder| folder.handler.clone()).collect();
    // containerd's level is that of its service; the shim has its own.
    if daemon.kind() == Kind::Crio {
        places.push(CRIO_LOG_LEVEL);
    }
    places.extend([SHIM_LOG_LEVEL, SHIM_CONFIGURATION]);
    places
}

/// The place of one of our files.
#[must_use]
pub fn place_of(daemon: Daemon, path: &Path) -> Option<Place> {
    let known = places(daemon).into_iter().chain([daemon.site().main_place()]);
    let class = classes::name_of(path).map(|name| classes::place(&name));
    known.chain(class).find(|place| Path::new(&*place.path) == path)
}

/// The drop-in that defines the handlers: `kata`, and one for each of these RuntimeClasses.
#[must_use]
pub fn handler(daemon: Daemon, format: Format, prefix: &Path, classes: &BTreeSet<String>) -> DropIn {
    let text = match format {
        Format::Crio => crio(prefix, classes),
        Format::ContainerdV2 => containerd(prefix, classes)
            .replace("\nversion = 3\n", "\nversion = 2\n")
            .replace(
                "[plugins.'io.containerd.cri.v1.runtime'.",
                "[plugins.'io.containerd.grpc.v1.cri'.",
            ),
        Format::ContainerdV3 => containerd(prefix, classes),
    };
    let Folder { path, handler, .. } = daemon.site().folder(format);
    let (folder, main) = (
        Daemon::Containerd.site().folders[0].path,
        Daemon::Containerd.site().main,
    );
    DropIn {
        place: handler.clone(),
        // The first comment says where it is.
        text: Some(text.replace(main, daemon.site().main).replace(folder, path)),
    }
}

/// Every file of ours outside the prefix. The handlers have one place; in the others, where another format is read,
/// there should be no file of ours.
#[must_use]
pub fn all(daemon: Daemon, format: Format, wanted: &Wanted<'_>) -> Vec<DropIn> {
    let Wanted {
        prefix,
        level,
        configuration,
        classes,
    } = *wanted;
    let handler = handler(daemon, format, prefix, &classes.keys().cloned().collect());
    let text = |place: &Place| {
        if *place == CRIO_LOG_LEVEL {
            (level != LogLevel::Info).then(|| {
                format!("{MARK}the log level of the cluster's KataConfig.\n[crio.runtime]\nlog_level = \"{level}\"\n")
            })
        } else if *place == SHIM_LOG_LEVEL {
            matches!(level, LogLevel::Debug | LogLevel::Trace).then(|| VERBOSE.to_owned())
        } else if *place == SHIM_CONFIGURATION {
            (!configuration.is_empty()).then(|| {
                format!(
                    "{MARK}the configuration of the cluster's KataConfig; a later file may say otherwise.\n\
                     {configuration}\n"
                )
            })
        } else {
            handler.text.clone().filter(|_| *place == handler.place)
        }
    };
    let ordinary = places(daemon).into_iter().map(|place| DropIn {
        text: text(&place),
        place,
    });
    let of_classes = classes.iter().map(|(name, text)| DropIn {
        place: classes::place(name),
        text: Some(text.clone()),
    });
    ordinary.chain(of_classes).collect()
}

/// The handlers that a file of the CRI's configuration defines, whoever's they are.
#[must_use]
pub fn defined(kind: Kind, table: &Table) -> BTreeSet<String> {
    let runtimes = |section: Option<&Value>| {
        let runtimes = section.and_then(|section| section.get("runtimes")?.as_table());
        runtimes.into_iter().flat_map(Table::keys).cloned().collect::<Vec<_>>()
    };
    match kind {
        Kind::Crio => {
            let runtime = table.get("crio").and_then(|crio| crio.get("runtime"));
            runtimes(runtime).into_iter().collect()
        }
        // The plugin's name is another one in each version of the file.
        Kind::Containerd => {
            let plugins = table.get("plugins").and_then(Value::as_table);
            let plugins = plugins.into_iter().flat_map(Table::values);
            plugins.flat_map(|plugin| runtimes(plugin.get("containerd"))).collect()
        }
    }
}

/// The handlers that a drop-in of ours defines.
#[must_use]
pub fn handlers_of(kind: Kind, text: &str) -> BTreeSet<String> {
    let table = text.starts_with(MARK).then(|| text.parse::<Table>().ok()).flatten();
    table.map(|table| defined(kind, &table)).unwrap_or_default()
}

/// The `version` that a text of containerd's configuration says it has.
#[must_use]
pub fn version_of(text: &str) -> Option<i64> {
    text.parse::<Table>().ok()?.get("version")?.as_integer()
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

/// A text from its first table on.
fn first_table(text: &str) -> &str {
    text.split_once("\n[")
        .map_or("", |(before, _)| &text[before.len() + 1..])
}

fn crio(prefix: &Path, classes: &BTreeSet<String>) -> String {
    let text = at_prefix(CRIO, prefix);
    let table = first_table(&text);
    let of_class = |name: &String| {
        let table = table.replace(&format!("runtimes.{HANDLER}]"), &format!("runtimes.{name}]"));
        let lines = table.lines().map(|line| match line.split_once(" = ") {
            Some((key @ "runtime_config_path", _)) => format!("{key} = \"{}\"", classes::place(name).path),
            _ => line.to_owned(),
        });
        format!("\n{}\n", lines.collect::<Vec<_>>().join("\n"))
    };
    let of_classes: String = classes.iter().map(of_class).collect();
    text.clone() + &of_classes
}

/// The shim looks for its configuration below the default prefix only; elsewhere the handler has to name it, and loses
/// what the text's last comment says. So does a handler with a file of its own.
fn containerd(prefix: &Path, classes: &BTreeSet<String>) -> String {
    let text = at_prefix(CONTAINERD, prefix);
    let (head, _) = text.split_once("# No options").unwrap_or((&text, ""));
    let table = first_table(head);
    let options = |name: &str, path: &str| {
        format!(
            "\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}.options]\nConfigPath = \"{path}\"\n"
        )
    };
    let first = match prefix == Path::new(DEFAULT_PREFIX) {
        true => text.clone(),
        false => {
            let path = format!("{}/current/configuration.toml", prefix.display());
            format!("{head}{}", options(HANDLER, &path))
        }
    };
    let of_class = |name: &String| {
        let table = table.replace(&format!("runtimes.{HANDLER}]"), &format!("runtimes.{name}]"));
        format!("\n{table}{}", options(name, &classes::place(name).path))
    };
    let of_classes: String = classes.iter().map(of_class).collect();
    first + &of_classes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn wanted(level: LogLevel, configuration: &str) -> Wanted<'_> {
        static NO_CLASSES: classes::Files = BTreeMap::new();
        Wanted {
            prefix: Path::new("/opt/sandpod"),
            level,
            configuration,
            classes: &NO_CLASSES,
        }
    }

    fn at<'t>(table: &'t Table, keys: &[&str]) -> Option<&'t Value> {
        let (last, sections) = keys.split_last()?;
        let section = sections
            .iter()
            .try_fold(table, |table, key| table.get(*key)?.as_table());
        section?.get(*last)
    }

    #[test]
    fn crios_handler_has_the_keys_that_a_vm_needs() {
        let file = handler(Daemon::Crio, Format::Crio, Path::new("/opt/sandpod"), &BTreeSet::new());
        assert_eq!(file.place.path, "/etc/crio/crio.conf.d/50-kata");
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

    /// The version of containerd's drop-in, and the table of its runtime.
    fn runtime(format: Format, prefix: &str) -> (i64, Table) {
        let text = handler(Daemon::Containerd, format, Path::new(prefix), &BTreeSet::new())
            .text
            .unwrap();
        let plugin = match format {
            Format::ContainerdV2 => "io.containerd.grpc.v1.cri",
            _ => "io.containerd.cri.v1.runtime",
        };
        let keys = ["plugins", plugin, "containerd", "runtimes", "kata"];
        let table: Table = text.parse().unwrap();
        assert_eq!(table["plugins"].as_table().unwrap().len(), 1);
        let runtime = at(&table, &keys).unwrap().as_table().unwrap().clone();
        (version_of(&text).unwrap(), runtime)
    }

    #[test]
    fn containerds_handler_names_its_configuration_only_where_the_shim_would_not_find_it() {
        for (format, version) in [(Format::ContainerdV2, 2), (Format::ContainerdV3, 3)] {
            let (usual, moved) = (runtime(format, "/opt/sandpod"), runtime(format, "/var/lib/sandpod"));
            assert_eq!((usual.0, moved.0), (version, version));
            assert_eq!(
                usual.1["runtime_path"],
                "/opt/sandpod/current/bin/containerd-shim-kata-v2".into()
            );
            assert_eq!(usual.1.get("options"), None);
            assert_eq!(
                moved.1["runtime_path"],
                "/var/lib/sandpod/current/bin/containerd-shim-kata-v2".into()
            );
            assert_eq!(
                moved.1["options"]["ConfigPath"],
                "/var/lib/sandpod/current/configuration.toml".into()
            );
        }
    }

    #[test]
    fn a_class_has_a_handler_like_katas_with_a_configuration_of_its_own() {
        let names = BTreeSet::from(["kata-debug".to_owned(), "kata-large".to_owned()]);
        for (daemon, format) in [
            (Daemon::Crio, Format::Crio),
            (Daemon::Containerd, Format::ContainerdV2),
            (Daemon::Containerd, Format::ContainerdV3),
        ] {
            for prefix in ["/opt/sandpod", "/var/lib/sandpod"] {
                let text = |names| handler(daemon, format, Path::new(prefix), names).text.unwrap();
                let (without, with) = (text(&BTreeSet::new()), text(&names));
                assert!(with.starts_with(&without), "{with}");
                assert_eq!(
                    handlers_of(daemon.kind(), &with),
                    ["kata", "kata-debug", "kata-large"].map(String::from).into()
                );
                assert_eq!(handlers_of(daemon.kind(), &with.replace(MARK, "# ")), BTreeSet::new());
                assert_eq!(prefix_of(&with), Some(prefix.into()));
                let table: Table = with.parse().unwrap();
                let runtime = |name: &str| {
                    let sections: &[&str] = match format {
                        Format::Crio => &["crio", "runtime", "runtimes", name],
                        Format::ContainerdV2 => {
                            &["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes", name]
                        }
                        Format::ContainerdV3 => &[
                            "plugins",
                            "io.containerd.cri.v1.runtime",
                            "containerd",
                            "runtimes",
                            name,
                        ],
                    };
                    at(&table, sections).unwrap().as_table().unwrap().clone()
                };
                let (mut kata, mut large) = (runtime("kata"), runtime("kata-large"));
                let path = match format {
                    Format::Crio => large.insert("runtime_config_path".into(), kata["runtime_config_path"].clone()),
                    _ => large.remove("options").map(|options| options["ConfigPath"].clone()),
                };
                kata.remove("options");
                assert_eq!(path, Some("/etc/sandpod/runtime-classes/kata-large.toml".into()));
                assert_eq!(kata, large);
            }
        }
    }

    #[test]
    fn containerds_handler_says_the_same_in_both_versions() {
        for prefix in ["/opt/sandpod", "/var/lib/sandpod"] {
            let [old, new] = [Format::ContainerdV2, Format::ContainerdV3].map(|format| runtime(format, prefix).1);
            assert_eq!(old, new);
        }
    }

    #[test]
    fn a_drop_in_tells_its_prefix() {
        for (daemon, format) in [
            (Daemon::Crio, Format::Crio),
            (Daemon::Containerd, Format::ContainerdV2),
            (Daemon::Containerd, Format::ContainerdV3),
            (Daemon::K3s, Format::ContainerdV3),
        ] {
            for prefix in ["/opt/sandpod", "/var/lib/sandpod"] {
                let text = handler(daemon, format, Path::new(prefix), &BTreeSet::new())
                    .text
                    .unwrap();
                assert_eq!(prefix_of(&text), Some(prefix.into()));
                assert_eq!(prefix_of(&text.replace(MARK, "# ")), None);
            }
        }
        assert_eq!(prefix_of("# Sandpod: edited\n"), None);
    }

    #[test]
    fn a_log_level_is_for_crio_and_a_verbose_one_for_the_shim() {
        let texts = |daemon, format, level| -> Vec<_> {
            let files = all(daemon, format, &wanted(level, "")).into_iter().skip(1);
            files
                .map(|file| file.text.map(|text| text.lines().skip(1).collect::<Vec<_>>().join(";")))
                .collect()
        };
        let crio = |level: &str| Some(format!("[crio.runtime];log_level = \"{level}\""));
        let shim = || Some("[runtime];enable_debug = true".to_owned());
        assert_eq!(texts(Daemon::Crio, Format::Crio, LogLevel::Info), [None, None, None]);
        assert_eq!(
            texts(Daemon::Crio, Format::Crio, LogLevel::Warn),
            [crio("warn"), None, None]
        );
        assert_eq!(
            texts(Daemon::Crio, Format::Crio, LogLevel::Debug),
            [crio("debug"), shim(), None]
        );
        assert_eq!(
            texts(Daemon::Containerd, Format::ContainerdV2, LogLevel::Trace),
            [shim(), None]
        );
    }

    #[test]
    fn the_configuration_of_a_kataconfig_comes_before_a_nodes_own() {
        let file = |configuration: &str| {
            let all = all(Daemon::Crio, Format::Crio, &wanted(LogLevel::Info, configuration));
            let mut files = all.into_iter().filter(|file| file.place == SHIM_CONFIGURATION);
            files.next().unwrap().text
        };
        assert_eq!(file(""), None);
        let text = file("[runtime]\nenable_debug = true").unwrap();
        assert!(
            text.starts_with(MARK) && text.ends_with("\n[runtime]\nenable_debug = true\n"),
            "{text}"
        );
        let place = Path::new(&*SHIM_CONFIGURATION.path);
        assert_eq!(place, Path::new(CONFIG_FOLDER).join(CONFIGURATION_NAME));
        assert!(place > Path::new(&*SHIM_LOG_LEVEL.path) && CONFIGURATION_NAME < "10-emulated.toml");
    }

    #[test]
    fn a_distributions_drop_in_is_in_the_folder_of_its_format_alone() {
        const FOLDER: &str = "/var/lib/rancher/k3s/agent/etc/containerd";
        for (format, folder) in [
            (Format::ContainerdV3, "config-v3.toml.d"),
            (Format::ContainerdV2, "config.toml.d"),
        ] {
            let files = all(Daemon::K3s, format, &wanted(LogLevel::Info, ""));
            let wanted: Vec<_> = files.iter().filter(|file| file.text.is_some()).collect();
            let [file] = wanted[..] else {
                panic!("{wanted:?}");
            };
            assert_eq!(file.place.path, format!("{FOLDER}/{folder}/50-kata.toml"));
            let text = file.text.as_deref().unwrap();
            assert!(
                text.contains(&*file.place.path) && text.contains(&format!("{FOLDER}/config.toml has\n")),
                "{text}"
            );
            assert!(
                text.contains(&format!("imports = [\"{FOLDER}/{folder}/*.toml\"]")),
                "{text}"
            );
        }
    }
}
