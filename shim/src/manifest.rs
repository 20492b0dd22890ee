//! What the recipe of a guest's image has written down beside its kernel: `manifest.json` of
//! `deploy/guest/build-image.sh`.

use std::{fs, io, path::Path};

use serde::Deserialize;

/// The file, in the folder of the kernel.
pub const FILE: &str = "manifest.json";

/// What is known of a guest's image. Of one of another make nothing is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// Its kernel.
    #[serde(default)]
    pub kernel: Kernel,
}

/// What is known of a guest's kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Kernel {
    /// The most processors that it takes (`CONFIG_NR_CPUS`).
    pub cpus: Option<u32>,
    /// The PCI devices that it has drivers for, each in the form of a `modalias` of sysfs, with `*` for any text.
    pub pci: Option<Vec<String>>,
}

impl Manifest {
    /// Reads what is beside a kernel. One that cannot be read is logged, and as good as none: it limits nothing.
    pub fn beside(kernel: &Path) -> Manifest {
        let path = kernel.with_file_name(FILE);
        let read = fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
        match read {
            Ok(manifest) => manifest,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Manifest::default(),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "what the guest's kernel can do is not known");
                Manifest::default()
            }
        }
    }
}

impl Kernel {
    /// Whether it has a driver for a PCI device, by the device's `modalias`; `None` if that is not known.
    pub fn drives(&self, modalias: &str) -> Option<bool> {
        let mut patterns = self.pci.as_ref()?.iter();
        Some(patterns.any(|pattern| matches(pattern.as_bytes(), modalias.as_bytes())))
    }
}

/// Whether a text is of a pattern, in which `*` is any text, as for `modprobe`.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if what follows the last `*` does not match: one letter more is the star's.
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(letter) if *letter == text[t] => (p, t) = (p + 1, t + 1),
            _ => match &mut star {
                Some((at, from)) => {
                    *from += 1;
                    (p, t) = (*at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|letter| *letter == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const NVME: &str = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02";

    fn drives(patterns: &[&str], modalias: &str) -> Option<bool> {
        let pci = Some(patterns.iter().map(|pattern| (*pattern).to_owned()).collect());
        Kernel { cpus: None, pci }.drives(modalias)
    }

    #[test]
    fn a_device_is_driven_by_its_class_or_by_its_numbers() {
        let by_class = "pci:v*d*sv*sd*bc01sc08i02";
        let by_numbers = "pci:v0000144Dd0000A808sv*sd*bc*sc*i*";
        for pattern in [by_class, by_numbers, "pci:v0000144Dd*sv0000144Dsd*bc*sc*i*", NVME, "*"] {
            assert_eq!(
                drives(&["pci:v00001AF4d*sv*sd*bc*sc*i*", pattern], NVME),
                Some(true),
                "{pattern}"
            );
        }
        for pattern in [
            "pci:v*d*sv*sd*bc02sc00i*",
            "pci:v0000144Dd0000A809sv*sd*bc*sc*i*",
            "pci:v0000144D",
            "",
        ] {
            assert_eq!(drives(&[pattern], NVME), Some(false), "{pattern}");
        }
        assert_eq!(Kernel::default().drives(NVME), None);
    }

    #[test]
    fn an_image_of_another_make_says_nothing_and_a_broken_manifest_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("vmlinux");
        assert_eq!(Manifest::beside(&kernel), Manifest::default());
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Manifest::beside(&kernel), Manifest::default());
        fs::write(
            folder.path().join(FILE),
            r#"{"guest": "own", "kernel": {"release": "6.12"}}"#,
        )
        .unwrap();
        assert_eq!(Manifest::beside(&kernel), Manifest::default());
        fs::write(
            folder.path().join(FILE),
            r#"{"kernel": {"cpus": 240, "pci": ["pci:*"]}}"#,
        )
        .unwrap();
        let found = Manifest::beside(&kernel).kernel;
        assert_eq!((found.cpus, found.drives(NVME)), (Some(240), Some(true)));
    }
}
