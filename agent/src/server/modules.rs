//! Kernel modules: those that the image names for every boot, and those that somebody asks for by name.
//!
//! A kernel with everything built in has none, and nothing here does anything.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, sys::utsname::uname};

use super::{
    error::{Doing, Error, Result},
    sys,
};

/// Paths of the modules to load at boot, one a line, each after what it depends on.
const BOOT_LIST: &str = "/etc/modules-load.list";
/// With this one loaded, there are virtio devices, the console and the ports that lead to the host.
const CHANNEL: &str = "virtio_console";

/// The modules to load at boot that are not loaded yet.
#[derive(Debug)]
pub(super) struct Boot(std::vec::IntoIter<PathBuf>);

impl Boot {
    /// Reads the list.
    pub(super) fn read() -> Result<Boot> {
        let text = match fs::read_to_string(BOOT_LIST) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.doing(|| format!("read {BOOT_LIST}"))?,
        };
        Ok(Boot(text.lines().map(PathBuf::from).collect::<Vec<_>>().into_iter()))
    }

    /// Loads up to the module of the virtio ports; whether there was one.
    pub(super) fn load_until_channel(&mut self) -> Result<bool> {
        for path in self.0.by_ref() {
            load_at_boot(&path)?;
            if name_of(&path) == CHANNEL {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether nothing is left.
    pub(super) fn is_done(&self) -> bool {
        self.0.len() == 0
    }

    /// Loads the rest. Blocks.
    pub(super) fn load_rest(self) -> Result<()> {
        self.0.into_iter().try_for_each(|path| load_at_boot(&path))
    }
}

fn load_at_boot(path: &Path) -> Result<()> {
    insert(path, "")?;
    // It lies in memory, and is not needed twice.
    fs::remove_file(path).doing(|| format!("remove {}", path.display()))
}

fn insert(path: &Path, parameters: &str) -> Result<()> {
    let what = || format!("load the kernel module {}", name_of(path));
    let file = File::open(path).doing(what)?;
    let parameters =
        CString::new(parameters).map_err(|_| Error::Invalid("a module's parameters contain NUL".into()))?;
    match sys::load_module(&file, &parameters) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).doing(what),
    }
}

/// Loads a module by its name or an alias of it, after what it depends on. Blocks.
pub(super) fn load(name: &str, parameters: &[String]) -> Result<()> {
    let kernel = uname().doing(|| "ask the kernel's release".into())?;
    let folder = Path::new("/lib/modules").join(kernel.release());
    let name = &canonical(name);
    let index = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default();
    if is_built_in(&index("modules.builtin"), name) {
        return match parameters {
            [] => Ok(()),
            [first, ..] => Err(Error::Invalid(format!(
                "the module {name} is built into the guest's kernel, which takes its parameters at boot alone: \
                 write {name}.{first} into `kernel_params`, not into `kernel_modules`"
            ))),
        };
    }
    if is_loaded(name) {
        return Ok(());
    }
    let dependencies = index("modules.dep");
    let mut wanted = vec![name.clone()];
    if order(&dependencies, name).is_none() {
        wanted = aliased(&index("modules.alias"), name);
    }
    let orders: Vec<_> = wanted.iter().filter_map(|name| order(&dependencies, name)).collect();
    if orders.is_empty() {
        return Err(Error::Invalid(format!("the guest's kernel has no module {name:?}")));
    }
    for path in orders.into_iter().flatten() {
        let found = name_of(&path);
        if !is_loaded(&found) {
            let parameters = if found == *name {
                parameters.join(" ")
            } else {
                String::new()
            };
            insert(&folder.join(&path), &parameters)?;
        }
    }
    Ok(())
}

/// What the kernel runs as `/sbin/modprobe -q -- <name>` when a protocol or a table is used for the first time.
pub(super) fn serve_kernel(arguments: impl Iterator<Item = String>) -> i32 {
    let names = arguments.filter(|argument| !argument.starts_with('-'));
    i32::from(!names.into_iter().all(|name| load(&name, &[]).is_ok()))
}

/// Whether a module is in the text of `modules.builtin` (a file a line).
fn is_built_in(built_in: &str, name: &str) -> bool {
    built_in.lines().any(|file| name_of(Path::new(file)) == name)
}

/// A module that is loaded, or is built in and has parameters.
fn is_loaded(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

/// The files of a module's dependencies and then its own, from the text of `modules.dep` (`<file>: <file>…`, of
/// which each depends on those after it), relative to the folder of that file.
fn order(dependencies: &str, name: &str) -> Option<Vec<PathBuf>> {
    let mut lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let (file, rest) = lines.find(|(file, _)| name_of(Path::new(file)) == name)?;
    let all = rest.split_whitespace().rev().chain([file]);
    Some(all.map(PathBuf::from).collect())
}

/// The modules that have an alias, from the text of `modules.alias` (`alias <pattern> <module>`).
fn aliased(aliases: &str, name: &str) -> Vec<String> {
    let lines = aliases.lines().filter_map(|line| line.strip_prefix("alias "));
    let pairs = lines.filter_map(|line| line.rsplit_once(' '));
    pairs
        .filter(|(pattern, _)| matches(&canonical(pattern), name))
        .map(|(_, module)| canonical(module))
        .collect()
}

/// Whether a text fits a pattern in which `*` stands for anything. Aliases that a kernel asks for by itself have
/// no other wildcards; those of devices do, which nobody plugs here.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(rest) = text.strip_prefix(head) else {
        return false;
    };
    let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    ends.into_iter().any(|at| matches(tail, &rest[at..]))
}

/// A module's name as the kernel spells it.
fn name_of(path: &Path) -> String {
    let stem = path.file_name().unwrap_or_default().to_string_lossy();
    canonical(stem.split('.').next().unwrap_or_default())
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\n\
                                kernel/net/802/stp.ko: kernel/net/llc/llc.ko\n\
                                kernel/net/llc/llc.ko:\n\
                                kernel/drivers/char/hw_random/virtio-rng.ko:\n";

    #[test]
    fn a_module_comes_after_what_it_depends_on() {
        let files = order(DEPENDENCIES, "bridge").unwrap();
        let names: Vec<_> = files.iter().map(|file| name_of(file)).collect();
        assert_eq!(names, ["llc", "stp", "bridge"]);
        assert_eq!(order(DEPENDENCIES, "virtio_rng").unwrap().len(), 1);
        assert_eq!(order(DEPENDENCIES, "brid"), None);
    }

    #[test]
    fn a_module_may_be_built_in() {
        let built_in = "kernel/drivers/net/tun.ko\nkernel/net/netfilter/xt_CT.ko\nkernel/fs/fuse/virtio-fs.ko\n";
        let found = ["tun", "xt_CT", "virtio_fs", "tu", "net"].map(|name| is_built_in(built_in, name));
        assert_eq!(found, [true, true, true, false, false]);
    }

    #[test]
    fn aliases_name_modules() {
        let aliases =
            "# a comment\nalias fs-overlay overlay\nalias ip6t-REJECT ip6t_REJECT\nalias net-pf-16-proto-* x\n";
        assert_eq!(aliased(aliases, "fs_overlay"), ["overlay"]);
        assert_eq!(aliased(aliases, "ip6t_REJECT"), ["ip6t_REJECT"]);
        assert_eq!(aliased(aliases, "net_pf_16_proto_12"), ["x"]);
        assert!(aliased(aliases, "net_pf_16").is_empty());
    }

    #[test]
    fn a_star_is_anything() {
        assert!(matches("a*", "a"));
        assert!(matches("a*c*", "abcd"));
        assert!(matches("*c", "abc"));
        assert!(!matches("a*d", "abc"));
    }
}
