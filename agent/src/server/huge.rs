//! Huge pages: as many as the limits of the containers that exist, taken out of the guest's memory for them.

use std::{fs, io, path::Path};

use oci_spec::runtime::Spec;
use tokio::sync::Mutex;

use super::{
    error::{Doing, Error, Result},
    sandbox::blocking,
};

/// What a cgroup calls the pages of 2 MiB, and where the kernel counts them (hugetlbpage.rst of Linux).
const SIZE: &str = "2MB";
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const BYTES: u64 = 2 << 20;

/// The number of pages that containers may use.
#[derive(Debug, Default)]
pub(super) struct HugePages(Mutex<u64>);

impl HugePages {
    /// Takes more pages out of the guest's memory.
    pub(super) async fn add(&self, pages: u64) -> Result<()> {
        if pages == 0 {
            return Ok(());
        }
        let mut all = self.0.lock().await;
        let wanted = *all + pages;
        let there = set(wanted).await?;
        if there < wanted {
            set(*all).await?;
            let text = format!("the guest has memory for {there} huge pages of {SIZE}, not for {wanted}");
            return Err(Error::Io("take huge pages".into(), io::Error::other(text)));
        }
        *all = wanted;
        Ok(())
    }

    /// Gives pages back. Those that a volume still holds go when it lets go.
    pub(super) async fn remove(&self, pages: u64) -> Result<()> {
        if pages == 0 {
            return Ok(());
        }
        let mut all = self.0.lock().await;
        *all = all.saturating_sub(pages);
        set(*all).await.map(drop)
    }
}

/// How many pages a container may use.
pub(super) fn wanted(spec: &Spec) -> u64 {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let limits = resources
        .and_then(|all| all.hugepage_limits().as_ref())
        .into_iter()
        .flatten();
    let bytes = limits
        .filter(|limit| limit.page_size() == SIZE)
        .map(|limit| u64::try_from(limit.limit()).unwrap_or(0));
    bytes.sum::<u64>() / BYTES
}

/// Asks for so many; how many there are then. The kernel may move gigabytes about for them.
async fn set(pages: u64) -> Result<u64> {
    let set = move || -> io::Result<u64> {
        let path = Path::new(COUNT);
        fs::write(path, pages.to_string())?;
        fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    blocking(move || set().doing(|| format!("have {pages} huge pages of {SIZE}"))).await
}
