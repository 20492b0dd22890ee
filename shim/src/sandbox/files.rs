//! Puts a container's files into the share, with an end to its patience: a volume's server may be gone, and the kernel
//! waits for it for ever.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::api::Mount;
use tokio::{sync::watch, time::timeout};

use super::lock;
use crate::{
    error::{Context, Error, Result},
    rootfs::Share,
    spec::ShareMount,
    volumes::Placed,
};

/// What a container is to have in the share.
pub(super) struct Files {
    /// Its id.
    pub container: String,
    /// What containerd's snapshotter asks for.
    pub rootfs: Vec<Mount>,
    /// The root file system that CRI-O has mounted.
    pub mounted: PathBuf,
    /// Its volumes.
    pub volumes: Vec<ShareMount>,
    /// The guest's agent takes a part of a volume for what it is ([`Share::add_volume`]).
    pub in_parts: bool,
}

/// Volumes, and where they are.
type Mounted = Vec<(ShareMount, Placed)>;

/// The paths of the host that somebody still waits for, though nobody waits for him any more.
#[derive(Debug, Default)]
pub(super) struct Stuck(Arc<Mutex<HashSet<PathBuf>>>);

impl Stuck {
    /// Mounts a container's files. What is mounted after `patience` is taken back.
    ///
    /// # Errors
    /// One cannot be had, or not in time; one that was not had in time before.
    pub async fn mount(&self, files: Files, share: &Share, patience: Duration) -> Result<Mounted> {
        self.check(&files)?;
        let (at, now_at) = watch::channel(files.mounted.clone());
        let (given_up, over) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let work = {
            let (share, given_up, over, stuck) = (share.clone(), given_up.clone(), over.clone(), self.0.clone());
            move || {
                let mounted = files.mount(&share, &at, &given_up);
                let mut stuck = lock(&stuck);
                over.store(true, Ordering::SeqCst);
                stuck.remove(&*at.borrow());
                drop(stuck);
                if given_up.load(Ordering::SeqCst)
                    && let Err(error) = share.remove(&files.container)
                {
                    tracing::warn!(%error, container = files.container, "the container's files stay mounted");
                }
                mounted
            }
        };
        let mounted = timeout(patience, tokio::task::spawn_blocking(work)).await;
        mounted.map_or_else(
            |_| {
                let source = now_at.borrow().clone();
                // The work looks at both behind this lock, too.
                let mut stuck = lock(&self.0);
                given_up.store(true, Ordering::SeqCst);
                if !over.load(Ordering::SeqCst) {
                    stuck.insert(source.clone());
                }
                Err(late(&source, patience))
            },
            |mounted| {
                mounted
                    .map_err(std::io::Error::other)
                    .action("mount the container's files")?
            },
        )
    }
}

impl Stuck {
    fn check(&self, files: &Files) -> Result<()> {
        let mut sources = files
            .volumes
            .iter()
            .map(|volume| &volume.source)
            .chain([&files.mounted]);
        let stuck = lock(&self.0);
        match sources.find(|source| stuck.contains(*source)) {
            None => Ok(()),
            Some(source) => Err(Error::Precondition(format!(
                "{} has not answered since a container wanted it before: does its server run?",
                source.display()
            ))),
        }
    }
}

impl Files {
    fn mount(&self, share: &Share, at: &watch::Sender<PathBuf>, given_up: &AtomicBool) -> Result<Mounted> {
        share.add_rootfs(&self.container, &self.rootfs, &self.mounted)?;
        let mut mounted = Vec::new();
        for volume in &self.volumes {
            if given_up.load(Ordering::SeqCst) {
                break;
            }
            at.send_replace(volume.source.clone());
            let placed = share.add_volume(&self.container, volume, self.in_parts)?;
            mounted.push((volume.clone(), placed));
        }
        Ok(mounted)
    }
}

/// The error of what cannot be had in time.
pub(super) fn late(source: &Path, patience: Duration) -> Error {
    Error::Precondition(format!(
        "{} did not answer within {} s (`create_container_timeout`): does its server run?",
        source.display(),
        patience.as_secs()
    ))
}
