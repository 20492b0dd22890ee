//! What somebody, mostly a CNI plugin, has set of a pod's sysctls. Source: CNI's plugins `tuning` and `bridge`;
//! Documentation/networking/ip-sysctl.rst of Linux.
//!
//! Linux gives each network namespace its own copy of /proc/sys/net. The guest's copy begins with the defaults of its
//! kernel, which need not be those of the host's: only what differs from a new namespace of the host's was set.

use super::NetError;
use super::namespace::{self, Namespace};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::{fs, io};

const ROOT: &str = "/proc/sys/net";

/// What the kernel derives from an interface's MTU, and a secret of each namespace.
const NOT_SET: &[&str] = &["mtu", "tcp_fastopen_key"];

/// Values by paths below [`ROOT`].
type Values = BTreeMap<String, String>;

/// The sysctls of a pod's namespace that somebody has set.
#[derive(Debug)]
pub(super) struct Sysctls {
    namespace: Namespace,
    interfaces: Vec<String>,
    changed: OnceLock<Vec<(String, String)>>,
}

impl Sysctls {
    /// Begins to read those of `namespace`, of the pod's `interfaces` and of none that the shim has made.
    pub(super) fn read(namespace: Namespace, interfaces: Vec<String>) -> Result<Arc<Sysctls>, NetError> {
        let sysctls = Arc::new(Sysctls {
            namespace,
            interfaces,
            changed: OnceLock::new(),
        });
        let reader = sysctls.clone();
        std::thread::Builder::new()
            .name("sysctls".into())
            .spawn(move || {
                reader.changed();
            })
            .map_err(|error| NetError::system("start a thread", error))?;
        Ok(sysctls)
    }

    /// Paths and values, in the order in which they are to be set. Blocks until they are read.
    pub(super) fn changed(&self) -> &[(String, String)] {
        self.changed.get_or_init(|| {
            let read = || values().map_err(|error| NetError::system(format!("read {ROOT}"), error));
            let both = self
                .namespace
                .enter(read)
                .and_then(|pod| Ok((pod, namespace::in_new(read)?)));
            match both {
                Ok((pod, new)) => changed(pod, &new, &self.interfaces),
                Err(error) => {
                    tracing::warn!(%error, "the guest has none of the sysctls of the pod's network");
                    Vec::new()
                }
            }
        })
    }
}

/// Everything in the thread's namespace that can be read and set.
fn values() -> io::Result<Values> {
    let mut values = Values::new();
    let mut folders = vec![PathBuf::from(ROOT)];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            // That of an interface that is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder != Path::new(ROOT) => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let Ok(metadata) = path.symlink_metadata() else {
                continue;
            };
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.permissions().mode() & 0o200 != 0
                && let (Ok(name), Ok(value)) = (path.strip_prefix(ROOT), fs::read_to_string(&path))
            {
                // What cannot be read has no value: it is an order to the kernel, or has not been set yet.
                values.insert(name.to_string_lossy().into_owned(), value.trim().to_owned());
            }
        }
    }
    Ok(values)
}

/// What of `pod` is not as in the `new` namespace; of an interface, not as in the defaults of a new one. That of the
/// whole namespace comes first: it may change that of its interfaces.
fn changed(pod: Values, new: &Values, interfaces: &[String]) -> Vec<(String, String)> {
    let is_carried = |name: &str, value: &String| {
        let parts: Vec<_> = name.split('/').collect();
        let before = match parts[..] {
            [family, kind @ ("conf" | "neigh"), interface, key] if !new.contains_key(name) => {
                // Only the first namespace has defaults of neighbours; the loopback begins with them.
                let like = if kind == "conf" { "default" } else { "lo" };
                let is_own = interfaces.iter().any(|own| own == interface);
                is_own.then(|| new.get(&[family, kind, like, key].join("/"))).flatten()
            }
            _ => new.get(name),
        };
        before.is_some_and(|before| before != value) && !NOT_SET.iter().any(|key| parts.last() == Some(key))
    };
    let mut changed: Vec<_> = pod
        .into_iter()
        .filter(|(name, value)| is_carried(name, value))
        .collect();
    changed.sort_by_key(|(name, _)| (name.matches('/').count(), !new.contains_key(name)));
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_a_new_namespace_is_carried_the_general_first() {
        let values = |all: &[(&str, &str)]| -> Values {
            let owned = all.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            owned.collect()
        };
        let new = values(&[
            ("core/somaxconn", "4096"),
            ("ipv4/conf/all/forwarding", "0"),
            ("ipv4/conf/default/arp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "2"),
            ("ipv4/ip_forward", "0"),
            ("ipv4/tcp_fastopen_key", "0-0-0-0"),
            ("ipv4/neigh/lo/gc_stale_time", "60"),
            ("ipv6/conf/default/mtu", "1280"),
        ]);
        let pod = values(&[
            ("core/somaxconn", "4096"),
            ("ipv4/conf/all/forwarding", "1"),
            ("ipv4/conf/default/arp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "2"),
            ("ipv4/conf/eth0.5/arp_filter", "1"),
            ("ipv4/conf/eth0.5/rp_filter", "2"),
            ("ipv4/conf/tap0_kata/arp_filter", "1"),
            ("ipv4/ip_forward", "1"),
            ("ipv4/tcp_fastopen_key", "a-b-c-d"),
            ("ipv4/neigh/eth0.5/gc_stale_time", "61"),
            ("ipv4/neigh/lo/gc_stale_time", "60"),
            ("ipv6/conf/eth0.5/mtu", "1400"),
            ("netfilter/of_a_module_that_came_meanwhile", "1"),
        ]);
        let changed = changed(pod, &new, &["eth0.5".into()]);
        let changed: Vec<_> = changed.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            changed,
            [
                "ipv4/ip_forward=1",
                "ipv4/conf/all/forwarding=1",
                "ipv4/conf/eth0.5/arp_filter=1",
                "ipv4/neigh/eth0.5/gc_stale_time=61"
            ]
        );
    }
}
