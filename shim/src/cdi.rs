//! What the node's CDI specifications say of a device (Container Device Interface 1.1, SPEC.md): the device files that
//! stand for it.
//!
//! Only those in JSON are read; one in YAML is named where a device is not found.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// How the keys of annotations begin whose values are names of devices.
pub const PREFIX: &str = "cdi.k8s.io/";
/// Where specifications are; one in the first folder hides one of the same device in the second.
const FOLDERS: [&str; 2] = ["var/run/cdi", "etc/cdi"];

/// Why a device's files are not known.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// Not a name.
    #[error("{0:?} is not the name of a CDI device like vendor.com/class=name")]
    Name(String),
    /// No specification has it.
    #[error("no JSON file in /var/run/cdi or /etc/cdi has the CDI device {device}{hint}")]
    Unknown {
        /// Its name.
        device: String,
        /// Which file might have it, or nothing.
        hint: String,
    },
    /// It is not made of such files.
    #[error("the CDI device {0} has no device node /dev/vfio/<group>, and no other can be given to a VM")]
    NoGroup(String),
    /// A folder that is there cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A specification, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Specification {
    kind: String,
    #[serde(default)]
    devices: Vec<Device>,
}

#[derive(Debug, Deserialize)]
struct Device {
    name: String,
    #[serde(default, rename = "containerEdits")]
    edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
struct Edits {
    #[serde(default, rename = "deviceNodes")]
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    path: PathBuf,
    /// Where it is on the host; at the same place without.
    #[serde(rename = "hostPath")]
    host: Option<PathBuf>,
}

/// The host's device files of the device called `vendor.com/class=name`, on a host whose file system is at `root`.
///
/// # Errors
/// A name that is none, a device that no specification has, and one without a VFIO group.
pub fn device_files(device: &str, root: &Path) -> Result<Vec<PathBuf>, CdiError> {
    let named = device
        .split_once('=')
        .filter(|(kind, name)| kind.contains('/') && !name.is_empty());
    let (kind, name) = named.ok_or_else(|| CdiError::Name(device.to_owned()))?;
    let mut unread = None;
    for file in specifications(root)? {
        if file.extension().is_none_or(|extension| extension != "json") {
            unread.get_or_insert((file, "is YAML, which is not read: write it as JSON"));
            continue;
        }
        let parsed = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let Some(specification): Option<Specification> = parsed else {
            unread.get_or_insert((file, "is no CDI specification"));
            continue;
        };
        let mut devices = specification.devices.into_iter();
        if specification.kind == kind
            && let Some(found) = devices.find(|device| device.name == name)
        {
            let files = found.edits.nodes.into_iter().map(|node| node.host.unwrap_or(node.path));
            let files: Vec<PathBuf> = files.collect();
            let group = |file: &PathBuf| crate::vfio::name(file).is_some_and(|name| name != "vfio");
            return match files.iter().any(group) {
                true => Ok(files),
                false => Err(CdiError::NoGroup(device.to_owned())),
            };
        }
    }
    let hint = unread.map_or(String::new(), |(file, why)| {
        // As the host calls it.
        let file = file.strip_prefix(root).unwrap_or(&file);
        format!("; /{} {why}", file.display())
    });
    Err(CdiError::Unknown {
        device: device.to_owned(),
        hint,
    })
}

/// The files of all folders, in their order and that of their names.
fn specifications(root: &Path) -> Result<Vec<PathBuf>, CdiError> {
    let mut all = Vec::new();
    for folder in FOLDERS.map(|folder| root.join(folder)) {
        let read = |source| CdiError::Read {
            path: folder.clone(),
            source,
        };
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(read(error)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(read)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if matches!(extension, Some("json" | "yaml" | "yml")) {
                files.push(path);
            }
        }
        files.sort();
        all.append(&mut files);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn host(files: &[(&str, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn gpu(node: &serde_json::Value) -> String {
        let devices =
            json!([{"name": "0", "containerEdits": {"deviceNodes": [node]}}, {"name": "none", "containerEdits": {}}]);
        json!({"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": devices}).to_string()
    }

    #[test]
    fn a_device_is_found_where_the_specification_says_and_the_nodes_own_wins() {
        let root = host(&[
            ("etc/cdi/gpu.json", gpu(&json!({"path": "/dev/vfio/7"}))),
            ("etc/cdi/notes.txt", "not looked at".into()),
        ]);
        let found = || device_files("vendor.com/gpu=0", root.path()).unwrap();
        assert_eq!(found(), [Path::new("/dev/vfio/7")]);
        let run = root.path().join("var/run/cdi");
        fs::create_dir_all(&run).unwrap();
        let node = json!({"path": "/dev/vfio/0", "hostPath": "/dev/vfio/8", "type": "c"});
        fs::write(run.join("gpu.json"), gpu(&node)).unwrap();
        assert_eq!(found(), [Path::new("/dev/vfio/8")]);
    }

    #[test]
    fn a_device_that_leads_nowhere_is_refused_by_its_name() {
        let root = host(&[("etc/cdi/gpu.json", gpu(&json!({"path": "/dev/nvidia0"})))]);
        let cases = [
            (
                "gpu=0",
                "\"gpu=0\" is not the name of a CDI device like vendor.com/class=name",
            ),
            ("vendor.com/gpu", "\"vendor.com/gpu\" is not the name"),
            (
                "vendor.com/gpu=1",
                "no JSON file in /var/run/cdi or /etc/cdi has the CDI device vendor.com/gpu=1",
            ),
            (
                "vendor.com/gpu=0",
                "the CDI device vendor.com/gpu=0 has no device node /dev/vfio/<group>",
            ),
            ("vendor.com/gpu=none", "vendor.com/gpu=none has no device node"),
        ];
        for (device, sentence) in cases {
            let error = device_files(device, root.path()).unwrap_err().to_string();
            assert!(
                error.starts_with(sentence) || error.contains(sentence),
                "{device}: {error}"
            );
            assert!(!error.contains(';'), "nothing is suspected: {error}");
        }
        assert!(device_files("vendor.com/gpu=0", Path::new("/nowhere")).is_err());
    }

    #[test]
    fn a_specification_that_is_not_read_is_named() {
        for (file, text, why) in [
            (
                "gpu.yaml",
                "kind: vendor.com/gpu",
                "is YAML, which is not read: write it as JSON",
            ),
            ("gpu.json", "kind: vendor.com/gpu", "is no CDI specification"),
        ] {
            let root = host(&[(&format!("var/run/cdi/{file}"), text.into())]);
            let error = device_files("vendor.com/gpu=0", root.path()).unwrap_err().to_string();
            assert!(error.ends_with(&format!("; /var/run/cdi/{file} {why}")), "{error}");
        }
    }
}
