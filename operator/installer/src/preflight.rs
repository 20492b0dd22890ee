//! What a node has to be before anything on it is changed.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use config::Config;
use nix::{
    errno::Errno,
    sys::statvfs::statvfs,
    unistd::{AccessFlags, access},
};
use node_check::{Finding, Verdict};

use super::{
    cri::Cri,
    daemon::Kind,
    dropin::{CONFIG_FOLDER, CONFIGURATION_NAME, DEFAULT_PREFIX},
    error::{Context, InstallError, Result},
    files::{self, Host},
    payload::Payload,
    state::Layout,
};
use crate::report::Accelerator;

/// Room for what is written besides the payload, in MiB.
const MARGIN_MIB: u64 = 16;

/// Refuses a CRI that is too old for a drop-in.
///
/// # Errors
/// It is.
pub fn refuse_old(cri: &Cri) -> Result<()> {
    match is_old(cri.daemon.kind(), cri.version.numbers) {
        false => Ok(()),
        true => Err(InstallError::CriTooOld {
            cri: cri.daemon.name(),
            version: cri.version.text.clone(),
            remedy: cri.daemon.site().update,
        }),
    }
}

/// Whether this version is too old.
fn is_old(kind: Kind, version: (u32, u32)) -> bool {
    match kind {
        // The first that finds the shims of its pods again after a restart.
        Kind::Crio => version < (1, 24),
        // Before, a drop-in's section for a plugin replaces that of the main file.
        Kind::Containerd => version < (2, 0),
    }
}

/// The file that the shim starts from for the handler `kata`: the payload's, or the administrator's own where the shim
/// prefers it ([`config::SEARCH_PATHS`]).
#[must_use]
pub fn base(layout: &Layout, kind: Kind) -> PathBuf {
    theirs(layout, kind).unwrap_or_else(|| layout.prefix.join("current/configuration.toml"))
}

fn theirs(layout: &Layout, kind: Kind) -> Option<PathBuf> {
    // Other handlers name their file.
    let searched = kind == Kind::Containerd && layout.prefix == Path::new(DEFAULT_PREFIX);
    let theirs = config::SEARCH_PATHS.iter().map(PathBuf::from);
    let mut theirs = theirs.filter(|path| !path.starts_with(&layout.prefix));
    theirs.find(|path| searched && layout.host.at(path).exists())
}

/// The configuration that pods will start with: that of [`base`], with the administrator's drop-ins. `new` stands for
/// what is to be written for the KataConfig.
///
/// # Errors
/// It is not valid.
pub fn configuration(layout: &Layout, kind: Kind, payload: Option<&str>, new: Option<&str>) -> Result<Config> {
    let invalid = |what: &Path, error: &config::ConfigError| InstallError::ConfigInvalid {
        what: format!("the configuration of the node's pods in {}", what.display()),
        why: error.to_string(),
    };
    if let Some(path) = theirs(layout, kind) {
        return Config::load(Some(&layout.host.at(&path))).map_err(|error| invalid(&path, &error));
    }
    let folder = layout.host.at(CONFIG_FOLDER);
    let mut drop_ins = BTreeMap::new();
    for name in files::names(&folder)?
        .into_iter()
        .filter(|name| name.ends_with(".toml"))
    {
        let text = files::read_text(&folder.join(&name))?;
        drop_ins.extend(text.map(|text| (name, text)));
    }
    if let Some(new) = new {
        drop_ins.insert(CONFIGURATION_NAME.to_owned(), new.to_owned());
    }
    let drop_ins: Vec<_> = drop_ins.values().map(String::as_str).collect();
    Config::parse(payload.unwrap_or_default(), &drop_ins).map_err(|error| invalid(Path::new(CONFIG_FOLDER), &error))
}

/// Judges what `node_check::node` found on the node. Returns warnings.
///
/// # Errors
/// No pod would run: no KVM, though pods are to have it, or a kernel that is too old.
pub fn judge(findings: &[Finding], accelerator: Accelerator) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for finding in findings {
        let emulated = accelerator == Accelerator::Tcg;
        match (finding.part, finding.verdict) {
            ("KVM", _) if emulated => {
                warnings.push(
                    "`accelerator = \"tcg\"`: every pod is emulated, some ten times slower than with KVM".to_owned(),
                );
            }
            (_, Verdict::Ok) => {}
            ("KVM", _) => return Err(InstallError::NoKvm(finding.detail.clone())),
            ("host kernel", Verdict::Missing) => {
                return Err(InstallError::NotFit(format!("the kernel {}", finding.detail)));
            }
            // A module that can be loaded at any time: its absence is no reason to leave the node alone.
            _ => warnings.push(format!("{}: {}", finding.part, finding.detail)),
        }
    }
    Ok(warnings)
}

/// Refuses a prefix in which, or on the way to which, others than root could put something in place of what root runs:
/// QEMU, virtiofsd, the shim. Others may have files of their own in a folder on the way that is sticky, as `/tmp` is.
///
/// # Errors
/// They could.
pub fn refuse_open(layout: &Layout) -> Result<()> {
    let way = files::way(&layout.host, &layout.prefix)?;
    for (number, folder) in way.iter().enumerate() {
        let place = layout.host.at(folder);
        let found = fs::metadata(&place).at("look at", &place)?;
        let is_last = number + 1 == way.len();
        let is_shared = !is_last && found.uid() == 0 && found.mode() & 0o1000 != 0;
        if let Some(how) = files::how_open(&found).filter(|_| !is_shared) {
            return Err(InstallError::UnsafePrefix {
                path: folder.clone(),
                how,
                prefix: layout.prefix.clone(),
            });
        }
    }
    Ok(())
}

/// Refuses a prefix that cannot be written, or a file system without room for the payload.
///
/// # Errors
/// Either.
pub fn refuse_full(layout: &Layout, payload: &Payload) -> Result<()> {
    let place = files::nearest_existing(&layout.root());
    let name = |host: &Host| host.name(&place);
    access(&place, AccessFlags::W_OK).map_err(|error| InstallError::ReadOnlyPrefix {
        path: name(&layout.host),
        source: error.into(),
    })?;
    let room = statvfs(&place).map_err(|error: Errno| InstallError::System {
        action: "ask for the free space",
        source: error.into(),
    })?;
    let free_mib = (room.blocks_available() * room.fragment_size()) >> 20;
    let needed_mib = (payload.manifest.bytes() >> 20) + MARGIN_MIB;
    // A file system that knows no size of its own, such as ramfs, has as much as the node has.
    if room.blocks() > 0 && free_mib < needed_mib {
        return Err(InstallError::DiskFull {
            path: name(&layout.host),
            free_mib,
            needed_mib,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::Accelerator as Wanted;
    use std::os::unix::fs::{PermissionsExt, chown};

    fn layout(root: &Path, prefix: &str) -> Layout {
        Layout {
            host: Host::new(root),
            prefix: prefix.into(),
        }
    }

    fn put(layout: &Layout, path: &str, text: &str) {
        let path = layout.host.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    const TCG: &str = "[hypervisor.qemu]\naccelerator = \"tcg\"\n";

    #[test]
    fn old_runtimes_are_refused_by_their_version() {
        assert!(is_old(Kind::Crio, (1, 23)) && !is_old(Kind::Crio, (1, 24)));
        assert!(is_old(Kind::Containerd, (1, 7)) && !is_old(Kind::Containerd, (2, 0)));
    }

    #[test]
    fn an_administrator_asks_for_emulation_where_pods_read_it() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path(), "/opt/sandpod");
        let wanted = |kind| {
            configuration(&layout, kind, Some(""), None)
                .unwrap()
                .hypervisor
                .accelerator
        };
        assert_eq!(wanted(Kind::Crio), Wanted::Kvm);
        put(&layout, "/etc/kata-containers/configuration.toml", TCG);
        assert_eq!(wanted(Kind::Containerd), Wanted::Tcg);
        // CRI-O's handler names the payload's file.
        assert_eq!(wanted(Kind::Crio), Wanted::Kvm);
        // A KataConfig may ask for it, and the node's own administrator has the last word.
        let asked = |new| {
            configuration(&layout, Kind::Crio, None, Some(new))
                .unwrap()
                .hypervisor
                .accelerator
        };
        assert_eq!(asked(TCG), Wanted::Tcg);
        put(
            &layout,
            "/etc/sandpod/config.d/10-mine.toml",
            &TCG.replace("tcg", "kvm"),
        );
        assert_eq!(asked(TCG), Wanted::Kvm);
        put(&layout, "/etc/sandpod/config.d/10-mine.toml", TCG);
        assert_eq!(wanted(Kind::Crio), Wanted::Tcg);
        put(
            &layout,
            "/etc/sandpod/config.d/20-typo.toml",
            "[hypervisor.qemu]\nacelerator = 1\n",
        );
        let error = configuration(&layout, Kind::Crio, None, None).unwrap_err().to_string();
        assert!(error.contains("`hypervisor.qemu.acelerator`"), "{error}");
    }

    #[test]
    fn a_prefix_is_roots_alone_up_to_the_root_folder() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path(), "/opt/vendor/sandpod");
        put(&layout, "/opt/vendor/README", "");
        let folder = |name: &str| layout.host.at(name);
        let mode = |name: &str, mode| fs::set_permissions(folder(name), fs::Permissions::from_mode(mode)).unwrap();
        let refused = || refuse_open(&layout).map_err(|error| error.to_string());
        refused().unwrap();
        // The group root is root.
        mode("/opt", 0o775);
        refused().unwrap();
        chown(folder("/opt"), None, Some(50)).unwrap();
        let error = refused().unwrap_err();
        assert!(error.starts_with("/opt can be written by others than root"), "{error}");
        assert!(error.contains("/opt/vendor/sandpod"), "{error}");
        mode("/opt", 0o1777);
        refused().unwrap();
        // Whoever is first in a shared folder has the name.
        mode("/opt/vendor", 0o1777);
        refused().unwrap_err();
        mode("/opt/vendor", 0o755);
        chown(folder("/opt/vendor"), Some(1000), None).unwrap();
        let error = refused().unwrap_err();
        assert!(error.starts_with("/opt/vendor belongs to the user 1000"), "{error}");
        chown(folder("/opt/vendor"), Some(0), None).unwrap();
        // What is there already is no better.
        put(&layout, "/opt/vendor/sandpod/current", "");
        mode("/opt/vendor/sandpod", 0o777);
        refused().unwrap_err();
    }

    #[test]
    fn a_link_is_followed_to_the_folder_that_counts() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path(), "/opt/sandpod");
        fs::create_dir_all(layout.host.at("/var/opt")).unwrap();
        std::os::unix::fs::symlink("var/opt", layout.host.at("/opt")).unwrap();
        refuse_open(&layout).unwrap();
        chown(layout.host.at("/var"), Some(1000), None).unwrap();
        let error = refuse_open(&layout).unwrap_err().to_string();
        assert!(error.starts_with("/var belongs"), "{error}");
        chown(layout.host.at("/var"), Some(0), None).unwrap();
        // Whoever can write to the folder of a link can make it another one.
        let open = layout.host.at("/open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        std::os::unix::fs::symlink("/var/opt", open.join("apps")).unwrap();
        let by_link = Layout {
            prefix: "/open/apps/sandpod".into(),
            ..layout
        };
        let error = refuse_open(&by_link).unwrap_err().to_string();
        assert!(error.starts_with("/open can be written"), "{error}");
    }

    fn finding(part: &'static str, verdict: Verdict) -> Finding {
        Finding {
            part,
            verdict,
            detail: "is absent".into(),
        }
    }

    #[test]
    fn only_kvm_and_the_kernel_are_strictly_needed() {
        let module = [
            finding("/dev/net/tun", Verdict::Missing),
            finding("/dev/vhost-net", Verdict::Slower),
        ];
        assert_eq!(judge(&module, Accelerator::Kvm).unwrap().len(), 2);
        let kvm = [finding("KVM", Verdict::Missing)];
        let error = judge(&kvm, Accelerator::Kvm).unwrap_err().to_string();
        assert!(error.starts_with("is absent; to emulate every pod instead"), "{error}");
        assert!(judge(&kvm, Accelerator::Tcg).unwrap()[0].contains("every pod is emulated"));
        let kernel = [finding("host kernel", Verdict::Missing)];
        assert!(judge(&kernel, Accelerator::Tcg).is_err());
    }
}
