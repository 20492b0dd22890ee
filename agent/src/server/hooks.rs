//! The guest's own hooks: programs of its image that run beside each container, by its OCI stages.
//!
//! The host names their folder (`guest_hook_path`); the conventions are those of `find_hooks` in
//! `src/agent/src/sandbox.rs` of kata-containers: executable regular files in `prestart`, `poststart` and `poststop`
//! below it, called with the stage's name.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use oci_spec::runtime::{Hook, Hooks, Spec};

/// Finds the hooks of each stage. A stage without a folder has none; a folder that is not there is told to the console,
/// and no error.
pub(super) fn find(folder: &Path) -> Hooks {
    if !folder.is_dir() {
        eprintln!("kata-agent: there is no folder of guest hooks {}", folder.display());
    }
    let stage = |name: &str| match of_stage(folder, name) {
        Ok(found) => found,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                eprintln!("kata-agent: cannot read the guest's {name} hooks: {error}");
            }
            Vec::new()
        }
    };
    // The protocol has prestart hooks, which later versions of the runtime specification advise against.
    #[allow(deprecated)]
    {
        let mut hooks = Hooks::default();
        hooks.set_prestart(some(stage("prestart")));
        hooks.set_poststart(some(stage("poststart")));
        hooks.set_poststop(some(stage("poststop")));
        hooks
    }
}

fn of_stage(folder: &Path, stage: &str) -> io::Result<Vec<Hook>> {
    let mut hooks = Vec::new();
    for entry in fs::read_dir(folder.join(stage))? {
        let entry = entry?;
        // Of the entry itself: links do not count.
        let found = entry.metadata()?;
        if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
            continue;
        }
        let mut hook = Hook::default();
        let name = entry.file_name().to_string_lossy().into_owned();
        hook.set_path(entry.path()).set_args(Some(vec![name, stage.to_owned()]));
        hooks.push(hook);
    }
    // Folders have no order.
    hooks.sort_by(|one, other| one.path().cmp(other.path()));
    Ok(hooks)
}

/// Adds the guest's hooks to a container's, after its own.
#[allow(deprecated)] // as above
pub(super) fn append(spec: &mut Spec, guest: &Hooks) {
    if [guest.prestart(), guest.poststart(), guest.poststop()]
        .iter()
        .all(|stage| stage.is_none())
    {
        return;
    }
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let both = |own: &Option<Vec<Hook>>, more: &Option<Vec<Hook>>| {
        some([own.clone(), more.clone()].into_iter().flatten().flatten().collect())
    };
    let prestart = both(hooks.prestart(), guest.prestart());
    let poststart = both(hooks.poststart(), guest.poststart());
    let poststop = both(hooks.poststop(), guest.poststop());
    hooks
        .set_prestart(prestart)
        .set_poststart(poststart)
        .set_poststop(poststop);
    spec.set_hooks(Some(hooks));
}

fn some(hooks: Vec<Hook>) -> Option<Vec<Hook>> {
    (!hooks.is_empty()).then_some(hooks)
}

#[cfg(test)]
#[allow(deprecated)] // as above
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(hooks: &Option<Vec<Hook>>) -> Vec<String> {
        hooks
            .iter()
            .flatten()
            .map(|hook| hook.path().file_name().unwrap().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn executable_files_are_hooks_of_their_stage_after_the_containers_own() {
        let folder = tempfile::tempdir().unwrap();
        let stage = folder.path().join("prestart");
        fs::create_dir(&stage).unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("readme", 0o644)] {
            fs::write(stage.join(name), "").unwrap();
            fs::set_permissions(stage.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(stage.join("folder")).unwrap();
        symlink("10-a", stage.join("30-link")).unwrap();
        let hooks = find(folder.path());
        assert_eq!(names(hooks.prestart()), ["10-a", "20-b"]);
        let first = hooks.prestart().as_ref().unwrap()[0].clone();
        assert_eq!(
            first.args().as_deref(),
            Some(&["10-a".to_owned(), "prestart".to_owned()][..])
        );
        assert_eq!((hooks.poststart(), hooks.poststop()), (&None, &None));

        let text =
            r#"{"ociVersion":"1.0.2","hooks":{"prestart":[{"path":"/own"}],"startContainer":[{"path":"/start"}]}}"#;
        let mut spec: Spec = serde_json::from_str(text).unwrap();
        append(&mut spec, &hooks);
        let hooks = spec.hooks().clone().unwrap();
        assert_eq!(names(hooks.prestart()), ["own", "10-a", "20-b"]);
        assert_eq!(names(hooks.start_container()), ["start"]);
    }

    #[test]
    fn without_a_folder_nothing_is_added() {
        let folder = tempfile::tempdir().unwrap();
        let hooks = find(&folder.path().join("missing"));
        let mut spec: Spec = serde_json::from_str(r#"{"ociVersion":"1.0.2"}"#).unwrap();
        let before = spec.clone();
        append(&mut spec, &hooks);
        assert_eq!(spec, before);
    }
}
