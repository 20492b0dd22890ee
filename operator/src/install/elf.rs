//! The interpreter of a program: the one that the payload carries, at the place where it is installed.
//!
//! A dynamic program names its interpreter (the loader of its libraries) by an absolute path, so it has to be told where it is installed. `deploy/payload.sh`
//! gives such a program a long placeholder; the kernel reads the path up to its first NUL (elf(5), PT_INTERP), so any shorter one fits in its place.

use std::path::Path;

use super::error::{InstallError, Result};

/// What a placeholder begins with.
pub const PLACEHOLDER: &str = "/sandpod-interpreter/";

/// PT_INTERP in elf(5).
const INTERP: u32 = 3;

/// Puts `interpreter` in the place of a placeholder. Bytes that are no 64-bit ELF file with one stay as they are; whether they were changed.
///
/// # Errors
/// The path is longer than the placeholder.
pub fn set_interpreter(program: &mut [u8], interpreter: &Path) -> Result<bool> {
    let Some((offset, size)) = placeholder(program) else {
        return Ok(false);
    };
    let path = interpreter.as_os_str().as_encoded_bytes();
    // The last byte has to be a NUL, or the kernel refuses the program.
    if path.len() >= size {
        let why = format!(
            "its programs have no room for an interpreter at {}",
            interpreter.display()
        );
        return Err(InstallError::Payload(why));
    }
    let place = &mut program[offset..offset + size];
    place.fill(0);
    place[..path.len()].copy_from_slice(path);
    Ok(true)
}

/// Where a placeholder is, and how many bytes it has.
fn placeholder(program: &[u8]) -> Option<(usize, usize)> {
    // Class 2 has 64 bits, data 1 is little-endian.
    if !program.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = number(program, 32, 8)?;
    let size = number(program, 54, 2)?;
    let count = number(program, 56, 2)?;
    let header = (0..count)
        .map(|index| headers + index * size)
        .find(|header| number(program, *header, 4) == Some(INTERP as usize))?;
    let (offset, length) = (number(program, header + 8, 8)?, number(program, header + 32, 8)?);
    let path = program.get(offset..offset.checked_add(length)?)?;
    path.starts_with(PLACEHOLDER.as_bytes()).then_some((offset, length))
}

fn number(program: &[u8], at: usize, bytes: usize) -> Option<usize> {
    let digits = program.get(at..at.checked_add(bytes)?)?;
    let number = digits
        .iter()
        .rev()
        .fold(0u64, |number, digit| number << 8 | u64::from(*digit));
    // Nothing in a real program is as large as to overflow where offsets are added.
    usize::try_from(number).ok().filter(|number| *number < usize::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program of one header and an interpreter.
    fn program(interpreter: &str, room: usize) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56 + room];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 3;
        bytes[64 + 8] = 120;
        bytes[64 + 32] = u8::try_from(room).unwrap();
        bytes[120..120 + interpreter.len()].copy_from_slice(interpreter.as_bytes());
        bytes
    }

    #[test]
    fn a_placeholder_becomes_a_path_with_its_nul() {
        let mut bytes = program(PLACEHOLDER, 60);
        assert!(set_interpreter(&mut bytes, Path::new("/opt/sandpod/lib/ld.so")).unwrap());
        assert!(bytes[120..].starts_with(b"/opt/sandpod/lib/ld.so\0\0"));
        assert!(bytes[142..].iter().all(|byte| *byte == 0));
        let mut bytes = program(PLACEHOLDER, 22);
        assert!(set_interpreter(&mut bytes, Path::new("/opt/sandpod/lib/ld.so")).is_err());
    }

    #[test]
    fn other_files_stay_as_they_are() {
        let mut foreign = program("/lib64/ld-linux-x86-64.so.2", 60);
        let mut text = b"[hypervisor.qemu]\n".to_vec();
        let mut short = b"\x7fELF\x02\x01".to_vec();
        for bytes in [&mut foreign, &mut text, &mut short] {
            let before = bytes.clone();
            assert!(!set_interpreter(bytes, Path::new("/x")).unwrap());
            assert_eq!(*bytes, before);
        }
    }
}
