//! How full a volume is: GetVolumeStats, in the terms of the Container Storage Interface (`NodeGetVolumeStats`).

use std::{io, path::Path};

use agent_protocol::protocol::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit};
use nix::{errno::Errno, fcntl::OFlag, sys::statvfs::fstatvfs};

use super::{
    beneath,
    error::{Doing, Error, Result},
};
/// Measures the file system that a volume of the guest is on: its bytes and its inodes. Blocks.
pub(super) fn stats(path: &str) -> Result<VolumeStatsResponse> {
    let volume = Path::new(path);
    if !beneath::is_ours(volume) {
        let text = format!("the volume {path:?} is not below {}", beneath::BASE);
        return Err(Error::Invalid(text));
    }
    let what = || format!("measure the volume {path:?}");
    let open = match beneath::open(volume, OFlag::O_PATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoVolume(path.to_owned())),
        Err(error) if error.raw_os_error() == Some(Errno::EXDEV as i32) => {
            let text = format!("the volume {path:?} leads out of {}", beneath::BASE);
            return Err(Error::Invalid(text));
        }
        opened => opened.doing(what)?,
    };
    let found = fstatvfs(&open).doing(what)?;
    let unit = found.fragment_size();
    let bytes = usage(
        Unit::BYTES,
        [found.blocks(), found.blocks_free(), found.blocks_available()].map(|n| n * unit),
    );
    let inodes = usage(
        Unit::INODES,
        [found.files(), found.files_free(), found.files_available()],
    );
    let mut condition = VolumeCondition::new();
    condition.message = "OK".into();
    let mut response = VolumeStatsResponse::new();
    response.usage = vec![bytes, inodes];
    response.volume_condition = Some(condition).into();
    Ok(response)
}

/// `free` is what nobody uses, `available` what of that is for everybody.
fn usage(unit: Unit, [total, free, available]: [u64; 3]) -> VolumeUsage {
    let mut usage = VolumeUsage::new();
    (usage.total, usage.available) = (total, available);
    usage.used = total.saturating_sub(free);
    usage.unit = unit.into();
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_for_root_is_neither_used_nor_available() {
        let usage = usage(Unit::BYTES, [100, 40, 35]);
        assert_eq!((usage.total, usage.used, usage.available), (100, 60, 35));
    }

    #[test]
    fn only_volumes_of_the_agent_are_measured() {
        for path in ["/etc", "", "/run/kata-containers/../../etc"] {
            let error = stats(path).unwrap_err();
            assert!(
                matches!(&error, Error::Invalid(text) if text.contains("is not below /run/kata-containers")),
                "{error}"
            );
        }
    }
}
