use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

/// A source, a folder for its copy, and what follows the one for the other.
struct Case {
    folder: tempfile::TempDir,
    volume: Volume,
}

impl Case {
    fn new() -> Case {
        let folder = tempfile::tempdir().unwrap();
        for name in ["source", "watchable"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let volume = Volume::new(folder.path().join("source"), folder.path().join("watchable/copy"));
        Case { folder, volume }
    }

    fn source(&self, path: &str) -> PathBuf {
        self.volume.source.join(path)
    }

    fn copy(&self, path: &str) -> PathBuf {
        self.volume.point.join(path)
    }

    fn update(&mut self) -> io::Result<Outcome> {
        let source = OwnedFd::from(File::open(&self.volume.source)?);
        let target = OwnedFd::from(File::open(self.folder.path().join("watchable"))?);
        let name = "copy".into();
        self.volume.update_at(&source, &Copy { target, name })
    }

    /// What an update of a ConfigMap does on the node: a new folder, the swap, links to new keys, and the old folder's
    /// end.
    fn publish(&self, stamp: &str, keys: &[(&str, &str)]) {
        let before = fs::read_link(self.source(KUBELET_DATA)).ok();
        fs::create_dir(self.source(stamp)).unwrap();
        for (key, value) in keys {
            fs::write(self.source(stamp).join(key), value).unwrap();
        }
        symlink(stamp, self.source("..data_tmp")).unwrap();
        fs::rename(self.source("..data_tmp"), self.source(KUBELET_DATA)).unwrap();
        for (key, _) in keys {
            // Most are there already.
            let _ = symlink(Path::new(KUBELET_DATA).join(key), self.source(key));
        }
        if let Some(before) = before {
            fs::remove_dir_all(self.source(before.to_str().unwrap())).unwrap();
        }
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.volume.point)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[test]
fn an_update_of_the_kubelet_is_one_swap() {
    let mut case = Case::new();
    case.publish("..1", &[("key", "old"), ("gone", "x")]);
    assert_eq!(case.update().unwrap(), Outcome::Copied);
    assert_eq!(case.names(), ["..1", "..data", "gone", "key"]);
    assert_eq!(fs::read_link(case.copy("key")).unwrap(), Path::new("..data/key"));
    assert_eq!(fs::read_to_string(case.copy("key")).unwrap(), "old");

    case.publish("..2", &[("key", "new"), ("more", "y")]);
    fs::remove_file(case.source("gone")).unwrap();
    case.update().unwrap();
    assert_eq!(case.names(), ["..2", "..data", "key", "more"]);
    assert_eq!(fs::read_link(case.copy(KUBELET_DATA)).unwrap(), Path::new("..2"));
    assert_eq!(fs::read_to_string(case.copy("key")).unwrap(), "new");
}

#[test]
fn without_a_swap_nothing_is_read_again() {
    let mut case = Case::new();
    case.publish("..1", &[("key", "value")]);
    case.update().unwrap();
    // What no update of the kubelet does: the swap is what is looked for.
    fs::write(case.source("..1/key"), "changed").unwrap();
    case.update().unwrap();
    assert_eq!(fs::read_to_string(case.copy("key")).unwrap(), "value");
}

#[test]
fn a_folder_without_a_swap_is_followed_file_by_file() {
    let mut case = Case::new();
    fs::create_dir_all(case.source("inner/deep")).unwrap();
    fs::write(case.source("inner/deep/file"), "1").unwrap();
    fs::write(case.source("plain"), "1").unwrap();
    fs::set_permissions(case.source("plain"), fs::Permissions::from_mode(0o640)).unwrap();
    case.update().unwrap();
    assert_eq!(
        fs::metadata(case.copy("plain")).unwrap().permissions().mode() & 0o7777,
        0o640
    );

    // A file becomes a folder, a folder a link; another file is another's, of the same size.
    fs::remove_dir_all(case.source("inner")).unwrap();
    symlink("plain", case.source("inner")).unwrap();
    fs::remove_file(case.source("plain")).unwrap();
    fs::create_dir(case.source("plain")).unwrap();
    fs::write(case.source("plain/other"), "2").unwrap();
    case.update().unwrap();
    assert_eq!(case.names(), ["inner", "plain"]);
    assert_eq!(fs::read_link(case.copy("inner")).unwrap(), Path::new("plain"));
    assert_eq!(fs::read_to_string(case.copy("plain/other")).unwrap(), "2");
}

#[test]
fn what_is_no_file_is_left_out_and_no_link_is_followed() {
    let mut case = Case::new();
    nix::unistd::mkfifo(&case.source("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/etc", case.source("etc")).unwrap();
    case.update().unwrap();
    assert_eq!(case.names(), ["etc"]);
    assert_eq!(fs::read_link(case.copy("etc")).unwrap(), Path::new("/etc"));
}

#[test]
fn a_swap_to_a_folder_that_is_gone_waits() {
    let mut case = Case::new();
    case.publish("..1", &[("key", "value")]);
    case.update().unwrap();
    symlink("..2", case.source("..data_tmp")).unwrap();
    fs::rename(case.source("..data_tmp"), case.source(KUBELET_DATA)).unwrap();
    assert_eq!(case.update().unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(fs::read_to_string(case.copy("key")).unwrap(), "value");
}

#[test]
fn what_is_too_large_is_not_copied() {
    let mut case = Case::new();
    let large = File::create(case.source("large")).unwrap();
    large.set_len(MOST_BYTES).unwrap();
    assert_eq!(case.update().unwrap(), Outcome::Copied);
    large.set_len(MOST_BYTES + 1).unwrap();
    assert!(matches!(case.update().unwrap(), Outcome::Refused(_)));
    // The copy stays as it was.
    assert_eq!(fs::metadata(case.copy("large")).unwrap().len(), MOST_BYTES);

    let mut case = Case::new();
    for n in 0..MOST_ENTRIES {
        fs::write(case.source(&n.to_string()), "").unwrap();
    }
    assert!(matches!(case.update().unwrap(), Outcome::Refused(_)));
    assert!(!case.volume.point.exists());
}

#[test]
fn a_copy_has_a_folder_of_its_kind() {
    for point in [
        "/run/kata-containers/shared/containers/x",
        "/run/kata-containers/watchable",
    ] {
        let error = make_room(Path::new(point)).unwrap_err().to_string();
        assert!(error.ends_with("is in no folder \"watchable\""), "{error}");
    }
    let error = Watches::default()
        .add(Path::new("/etc"), Path::new("/x/watchable/y"))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the source /etc of a watchable volume is not below /run/kata-containers"
    );
}
