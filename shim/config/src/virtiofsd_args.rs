//! Which arguments of virtiofsd (1.14, its `src/main.rs`) somebody may add to ours.
//!
//! Its options can share another folder, serve without a sandbox, or with more rights. So those are named that may be
//! added, and not those that may not: a later virtiofsd may have more of them.

/// These change how quickly files are served and what of them the guest sees, but not which, nor to whom.
const ANYBODYS: &[&str] = &[
    "allow-direct-io",
    "allow-mmap",
    "inode-file-handles",
    "killpriv-v2",
    "log-level",
    "posix-acl",
    "preserve-noatime",
    "readdirplus",
    "thread-pool-size",
    "writeback",
    "xattr",
];

/// These give virtiofsd rights, or change what files mean to the host.
const THE_NODES: &[&str] = &["modcaps", "rlimit-nofile", "security-label", "xattrmap"];

/// What has a value, which may be the next word.
const WITH_VALUE: &[&str] = &["log-level", "modcaps", "rlimit-nofile", "thread-pool-size", "xattrmap"];

/// Who adds arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// The node's configuration.
    Node,
    /// A pod's annotation.
    Pod,
}

/// Answers the first argument that may not be added.
pub(super) fn first_refused(args: &[String], whose: Whose) -> Option<&str> {
    let is_allowed = |name: &str| {
        let name = name.strip_prefix("no-").unwrap_or(name);
        ANYBODYS.contains(&name) || (whose == Whose::Node && THE_NODES.contains(&name))
    };
    let mut words = args.iter().map(String::as_str);
    while let Some(word) = words.next() {
        // As the virtiofsd of QEMU took them, and Kata's configuration files have them.
        if word == "-o" {
            let options = words.next().unwrap_or_default();
            let refused = options.split(',').find(|option| {
                let name = option.split('=').next().unwrap_or_default().replace('_', "-");
                name != "announce-submounts" && name != "loglevel" && !is_allowed(&name)
            });
            match refused {
                Some(_) => return Some(options),
                None => continue,
            }
        }
        let Some(option) = word.strip_prefix("--") else {
            return Some(word);
        };
        let (name, value) = option
            .split_once('=')
            .map_or((option, None), |(name, value)| (name, Some(value)));
        if !is_allowed(name) {
            return Some(word);
        }
        if value.is_none() && WITH_VALUE.contains(&name) {
            words.next();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(args: &[&str], whose: Whose) -> Option<String> {
        let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        first_refused(&args, whose).map(str::to_owned)
    }

    #[test]
    fn what_changes_no_boundary_may_be_added() {
        for args in [
            &["--thread-pool-size=1", "-o", "announce_submounts"][..],
            &["--thread-pool-size", "4", "--xattr"],
            &["-o", "xattr,no_writeback,loglevel=debug", "--no-readdirplus"],
            &["--inode-file-handles=prefer", "--posix-acl=always", "--killpriv-v2"],
        ] {
            assert_eq!(refused(args, Whose::Pod), None, "{args:?}");
        }
        assert_eq!(refused(&["--modcaps=+sys_admin"], Whose::Node), None);
    }

    #[test]
    fn nothing_that_shares_more_or_guards_less_may() {
        for args in [
            &["--shared-dir=/"][..],
            &["--shared-dir", "/"],
            &["--sandbox=none"],
            &["--seccomp=none"],
            &["--cache=never"],
            &["--fd=3"],
            &["--socket=/x"],
            &["--socket-path=/x"],
            &["--socket-group=users"],
            &["--no-announce-submounts"],
            &["--announce-submounts"],
            &["--translate-uid=map:0:0:1"],
            &["--uid-map=:0:0:1:"],
            &["--tag=x"],
            &["-o", "source=/"],
            &["-o", "xattr,sandbox=chroot"],
            &["-o", "cache=none"],
            &["-o", "no_announce_submounts"],
            &["-osource=/"],
            &["-f"],
            &["/"],
            &["--xattr", "/"],
            &["--thread-pool-size=1", "/"],
            &["--made-later"],
        ] {
            assert!(refused(args, Whose::Node).is_some(), "{args:?}");
        }
        for args in [
            &["--modcaps=+sys_admin"][..],
            &["-o", "modcaps=+sys_admin"],
            &["--xattrmap=:map::x:"],
        ] {
            assert!(refused(args, Whose::Pod).is_some(), "{args:?}");
        }
    }
}
