//! What the CRI makes of its configuration, as far as it tells: with our handler it has to be what it was without.
//!
//! A drop-in can change how the files beside it are read, and a CRI that reads less than before still serves, has our
//! handler, and only starts other people's pods wrongly.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the CRI was like before a change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Baseline {
    /// Its configuration without our handler; none where it does not tell.
    pub config: Option<Value>,
    /// Of CRI-O, the handlers that are not ours; likewise.
    pub handlers: Option<Value>,
    /// The conditions that held, such as `NetworkReady`.
    pub ready: BTreeSet<String>,
}

/// A condition of a CRI that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// Such as `NetworkReady`.
    pub condition: String,
    /// What the CRI says of it.
    pub why: String,
}

impl Baseline {
    /// The first condition that held and holds no longer. `now` has all that the CRI knows, and why those that do not
    /// hold do not.
    #[must_use]
    pub fn unmet(&self, now: &BTreeMap<String, Result<(), String>>) -> Option<Unmet> {
        let why = |condition: &String| match now.get(condition) {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why.clone()),
            None => Some("it does not tell".to_owned()),
        };
        self.ready.iter().find_map(|condition| {
            Some(Unmet {
                condition: condition.clone(),
                why: why(condition)?,
            })
        })
    }
}

/// The configuration that containerd tells by the CRI, without our handlers.
#[must_use]
pub fn told(mut config: Value, ours: &BTreeSet<String>) -> Value {
    forget_handlers(&mut config, ours);
    config
}

/// The configuration that containerd's own program prints, without our handlers and without the names of imported files:
/// only what they say counts.
///
/// # Errors
/// It is no TOML.
pub fn printed(text: &str, ours: &BTreeSet<String>) -> Result<Value, String> {
    let mut config: Value = toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())?;
    if let Some(config) = config.as_object_mut() {
        config.remove("imports");
    }
    let plugins = config.get_mut("plugins").and_then(Value::as_object_mut);
    for plugin in plugins.into_iter().flat_map(|plugins| plugins.values_mut()) {
        forget_handlers(plugin, ours);
    }
    Ok(config)
}

fn forget_handlers(section: &mut Value, ours: &BTreeSet<String>) {
    let runtimes = section
        .pointer_mut("/containerd/runtimes")
        .and_then(Value::as_object_mut);
    if let Some(runtimes) = runtimes {
        runtimes.retain(|name, _| !ours.contains(name));
    }
}

/// The path of the first thing that is not the same in both, as TOML writes it. Values are left out: they may be
/// somebody's passwords.
#[must_use]
pub fn difference(before: &Value, after: &Value) -> Option<String> {
    let mut path = Vec::new();
    differs(before, after, &mut path).then(|| path.join("."))
}

/// Whether two things differ; `path` leads to the first one then.
fn differs(before: &Value, after: &Value, path: &mut Vec<String>) -> bool {
    let (Some(old), Some(new)) = (before.as_object(), after.as_object()) else {
        return before != after;
    };
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    for key in keys {
        path.push(quoted(key));
        let differ = match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) => differs(old, new, path),
            _ => true,
        };
        if differ {
            return true;
        }
        path.pop();
    }
    false
}

/// A key of a path: one that has dots is quoted.
fn quoted(key: &str) -> String {
    let bare = |letter: char| letter.is_ascii_alphanumeric() || "_-".contains(letter);
    match !key.is_empty() && key.chars().all(bare) {
        true => key.to_owned(),
        false => format!("\"{key}\""),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ours() -> BTreeSet<String> {
        ["kata", "kata-large"].map(String::from).into()
    }

    #[test]
    fn what_differs_first_is_named_by_its_path() {
        let before = json!({"plugins": {"a.b": {"cgroup": true, "image": "x"}}, "root": "/"});
        assert_eq!(difference(&before, &before), None);
        for (after, path) in [
            (
                json!({"plugins": {"a.b": {"cgroup": false, "image": "y"}}, "root": "/"}),
                "plugins.\"a.b\".cgroup",
            ),
            (json!({"plugins": {"a.b": {"cgroup": true}}}), "plugins.\"a.b\".image"),
            (
                json!({"plugins": {"a.b": {"cgroup": true, "image": "x"}, "c": {}}, "root": "/"}),
                "plugins.c",
            ),
            (json!({"plugins": null, "root": "/"}), "plugins"),
        ] {
            assert_eq!(difference(&before, &after).as_deref(), Some(path));
        }
    }

    #[test]
    fn our_own_handler_is_no_difference_and_another_one_is() {
        let tell = |runtimes: Value| {
            told(
                json!({"containerd": {"runtimes": runtimes}, "enableSelinux": true}),
                &ours(),
            )
        };
        let (runc, crun) = (json!({"type": "runc"}), json!({"type": "crun"}));
        let before = tell(json!({"runc": runc}));
        assert_eq!(
            difference(&before, &tell(json!({"runc": runc, "kata": {}, "kata-large": {}}))),
            None
        );
        assert_eq!(
            difference(&before, &tell(json!({"crun": crun, "kata": {}, "runc": runc}))).as_deref(),
            Some("containerd.runtimes.crun")
        );
        // CRI-O tells other things, and fewer.
        assert_eq!(
            told(json!({"sandboxImage": "pause"}), &ours()),
            json!({"sandboxImage": "pause"})
        );
    }

    #[test]
    fn what_the_program_prints_is_read_without_our_handler_of_either_version() {
        let print = |plugin: &str, more: &str| {
            let text = format!(
                "version = 3\n[plugins.'{plugin}'.containerd.runtimes.runc]\n\
                 runtime_type = 'io.containerd.runc.v2'\n{more}"
            );
            printed(&text, &ours()).unwrap()
        };
        for plugin in ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"] {
            let ours =
                format!("[plugins.'{plugin}'.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n");
            assert_eq!(difference(&print(plugin, ""), &print(plugin, &ours)), None);
            let theirs = ours.replace("runtimes.kata", "runtimes.nvidia");
            assert_eq!(
                difference(&print(plugin, &theirs), &print(plugin, &ours)),
                Some(format!("plugins.\"{plugin}\".containerd.runtimes.nvidia"))
            );
        }
        assert_eq!(
            printed("imports = ['/a']\n", &ours()),
            printed("imports = ['/b']\n", &ours())
        );
        assert!(printed("[plugins", &ours()).is_err());
    }

    #[test]
    fn only_a_condition_that_held_is_missed() {
        let baseline = Baseline {
            ready: ["NetworkReady".to_owned()].into(),
            ..Baseline::default()
        };
        let now = |network: Result<(), String>| {
            BTreeMap::from([
                ("NetworkReady".to_owned(), network),
                ("RuntimeReady".to_owned(), Err("never".to_owned())),
            ])
        };
        assert_eq!(baseline.unmet(&now(Ok(()))), None);
        let unmet = baseline.unmet(&now(Err("no network config found".to_owned()))).unwrap();
        assert_eq!(
            (unmet.condition.as_str(), unmet.why.as_str()),
            ("NetworkReady", "no network config found")
        );
        assert_eq!(baseline.unmet(&BTreeMap::new()).unwrap().why, "it does not tell");
    }
}
