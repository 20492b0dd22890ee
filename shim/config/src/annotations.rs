//! A pod's `io.katacontainers.config.*` annotations as a drop-in.
//!
//! Source: `docs/how-to/how-to-set-sandbox-config-kata.md` and `kata-types/src/annotations` of kata-containers.

use super::keys::{self, Kind};
use super::virtiofsd_args::{self, Whose};
use super::{ConfigError, Hypervisor};
use std::collections::{BTreeMap, HashMap};
use toml::{Table, Value};

const PREFIX: &str = "io.katacontainers.config";

/// What parameters of the kernel begin with that the agent reads.
const OURS: &str = "sandpod.";

/// Annotations whose last part is not the key of the file.
const RENAMED: &[(&str, &str)] = &[
    ("default_max_vcpus", "default_maxvcpus"),
    ("blk_logical_sector_size", "block_device_logical_sector_size"),
    ("blk_physical_sector_size", "block_device_physical_sector_size"),
    ("block_device_num_queues", "num_queues"),
    ("block_device_queue_size", "queue_size"),
    ("cc_init_data", "initdata"),
];

/// The part of a configuration file that says what `annotations` say.
///
/// # Errors
/// A key that is unknown, not enabled, or not for a pod to decide.
pub(super) fn tables(annotations: &HashMap<String, String>, node: &Hypervisor) -> Result<Table, ConfigError> {
    // Sorted, so that of two wrong annotations always the same one is named.
    let asked: BTreeMap<_, _> = annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)).collect();
    let (mut qemu, mut kata, mut runtime) = (Table::new(), Table::new(), Table::new());
    for (annotation, value) in asked {
        let (group, key) = annotation[PREFIX.len()..].strip_prefix('.').and_then(|rest| rest.split_once('.')).ok_or_else(
            || refused(annotation, "a pod decides neither on the node's configuration file nor on anything outside hypervisor, agent and runtime"),
        )?;
        match group {
            "hypervisor" => {
                enabled(annotation, key, value, node)?;
                let key = RENAMED.iter().find(|(from, _)| *from == key).map_or(key, |(_, to)| to);
                let mut value = typed(annotation, &format!("hypervisor.qemu.{key}"), value)?;
                // The pod adds to what the node has of these, it does not replace it.
                match (key, &mut value) {
                    ("kernel_params", Value::String(text)) => {
                        if let Some(word) = text.split_whitespace().find(|word| word.starts_with(OURS)) {
                            let why = format!("`{word}` is the shim's word to its own agent");
                            return Err(refused(annotation, &why));
                        }
                        *text = format!("{} {text}", node.kernel_params.join(" "));
                    }
                    ("virtio_fs_extra_args", Value::Array(list)) => {
                        let added: Vec<_> = list.iter().filter_map(|arg| arg.as_str().map(str::to_owned)).collect();
                        if let Some(arg) = virtiofsd_args::first_refused(&added, Whose::Pod) {
                            return Err(refused(annotation, &format!("`{arg}` is not for a pod to decide")));
                        }
                        let nodes = node.virtio_fs_extra_args.iter().map(|arg| Value::String(arg.clone()));
                        list.splice(0..0, nodes);
                    }
                    _ => {}
                }
                qemu.insert(key.to_owned(), value);
            }
            "agent" => drop(kata.insert(key.to_owned(), typed(annotation, &format!("agent.kata.{key}"), value)?)),
            "runtime" => {
                if key == "disable_guest_seccomp" && value.trim() == "true" {
                    return Err(refused(
                        annotation,
                        "only the node's configuration may switch seccomp off",
                    ));
                }
                drop(runtime.insert(key.to_owned(), typed(annotation, &format!("runtime.{key}"), value)?));
            }
            _ => return Err(refused(annotation, "the groups are hypervisor, agent and runtime")),
        }
    }
    let mut all = Table::new();
    nest(&mut all, &["hypervisor", "qemu"], qemu);
    nest(&mut all, &["agent", "kata"], kata);
    nest(&mut all, &["runtime"], runtime);
    Ok(all)
}

/// Whether the administrator lets a pod set this hypervisor key, and a path key to this value.
fn enabled(annotation: &str, key: &str, value: &str, node: &Hypervisor) -> Result<(), ConfigError> {
    let listed = node
        .enable_annotations
        .iter()
        .any(|pattern| matches(&pattern.replace(".*", "*"), key));
    if !listed {
        return Err(ConfigError::NotEnabled {
            annotation: annotation.to_owned(),
            key: key.to_owned(),
        });
    }
    if key == "image" {
        return Err(refused(annotation, keys::NO_IMAGE));
    }
    let valid = match key {
        "path" => Some(&node.valid_paths),
        "virtio_fs_daemon" => Some(&node.valid_virtio_fs_daemon_paths),
        _ => None,
    };
    match valid {
        Some(patterns) if !patterns.iter().any(|pattern| matches(pattern, value)) || value.contains("..") => Err(
            refused(annotation, "the node's list of valid paths does not hold this one"),
        ),
        _ => Ok(()),
    }
}

/// The annotation's text as the TOML value that the key takes.
fn typed(annotation: &str, name: &str, text: &str) -> Result<Value, ConfigError> {
    let Some(treatment) = keys::treatment(name) else {
        let reason = format!(
            "there is no such key; the nearest known one is `{}`",
            keys::nearest(name)
        );
        return Err(refused(annotation, &reason));
    };
    let text = text.trim();
    let wrong = |wanted: &str| refused(annotation, &format!("its value `{text}` is not {wanted}"));
    Ok(match treatment.kind() {
        Kind::Bool => Value::Boolean(text.parse().map_err(|_| wrong("true or false"))?),
        Kind::Integer => Value::Integer(text.parse().map_err(|_| wrong("a whole number"))?),
        Kind::Number => Value::Float(text.parse().map_err(|_| wrong("a number"))?),
        Kind::Text => Value::String(text.to_owned()),
        Kind::List => list(name, text),
    })
}

/// Kernel modules are separated by `;` because each may have parameters; other lists by `,` or spaces.
fn list(name: &str, text: &str) -> Value {
    let items: Vec<&str> = if name.ends_with(".kernel_modules") {
        text.split(';').collect()
    } else {
        text.split([',', ' ']).collect()
    };
    let words = items.into_iter().map(str::trim).filter(|item| !item.is_empty());
    Value::Array(words.map(|word| Value::String(word.to_owned())).collect())
}

fn refused(annotation: &str, reason: &str) -> ConfigError {
    ConfigError::Annotation {
        annotation: annotation.to_owned(),
        reason: reason.to_owned(),
    }
}

fn nest(all: &mut Table, path: &[&str], inner: Table) {
    if inner.is_empty() {
        return;
    }
    if let Some((first, rest)) = path.split_first() {
        let mut value = Table::new();
        nest(&mut value, rest, inner.clone());
        all.insert(
            (*first).to_owned(),
            Value::Table(if rest.is_empty() { inner } else { value }),
        );
    }
}

/// Whether `text` is `pattern`, where a `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text
            .strip_prefix(start)
            .is_some_and(|tail| (0..=tail.len()).any(|at| tail.is_char_boundary(at) && matches(rest, &tail[at..]))),
    }
}
