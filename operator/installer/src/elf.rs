//! Where a program finds its interpreter and its libraries: those that the payload carries, at the place where it is
//! installed.
//!
//! A dynamic program names its interpreter (the loader of its libraries) by an absolute path, and the loader trusts no
//! library path that is relative to a program that gets another SELinux domain (`AT_SECURE` in getauxval(3)). So both
//! have to be told where they are installed. `deploy/payload.sh` gives such a program a long placeholder for each; who
//! reads them (elf(5), PT_INTERP and DT_RPATH) does so up to the first NUL, so any shorter path fits in its place.

use std::path::Path;

use memchr::memmem;

use super::error::{InstallError, Result};

/// What the placeholder of the interpreter begins with.
pub const INTERPRETER: &str = "/sandpod-interpreter/";

/// What the placeholder of the libraries' folder begins with.
pub const LIBRARIES: &str = "/sandpod-libraries/";

/// Puts `path` in the place of a placeholder that begins with `placeholder`. Bytes that are no ELF file with one stay
/// as they are; whether they were changed.
///
/// # Errors
/// The path is longer than the placeholder.
pub fn set_path(program: &mut [u8], placeholder: &str, path: &Path) -> Result<bool> {
    let placeholder = placeholder.as_bytes();
    if !program.starts_with(b"\x7fELF") {
        return Ok(false);
    }
    let Some(place) = memmem::find(program, placeholder).and_then(|start| program.get_mut(start..)) else {
        return Ok(false);
    };
    let room = place.iter().position(|byte| *byte == 0).unwrap_or_default();
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.len() > room {
        let why = format!("its programs have no room for the path {}", path.display());
        return Err(InstallError::Payload(why));
    }
    place[..room].fill(0);
    place[..bytes.len()].copy_from_slice(bytes);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with a placeholder of so many bytes, and something after it.
    fn program(placeholder: &str, room: usize) -> Vec<u8> {
        format!("\x7fELF...\0{placeholder:x<room$}\0after").into_bytes()
    }

    #[test]
    fn a_placeholder_becomes_a_path_with_its_nul() {
        let path = Path::new("/opt/sandpod/lib/ld.so");
        for placeholder in [INTERPRETER, LIBRARIES] {
            let mut bytes = program(placeholder, 60);
            assert!(set_path(&mut bytes, placeholder, path).unwrap());
            let expected = format!("\x7fELF...\0/opt/sandpod/lib/ld.so{}after", "\0".repeat(60 - 22 + 1));
            assert_eq!(String::from_utf8(bytes).unwrap(), expected);
        }
        assert!(set_path(&mut program(INTERPRETER, 22), INTERPRETER, path).unwrap());
        assert!(set_path(&mut program(INTERPRETER, 21), INTERPRETER, path).is_err());
    }

    #[test]
    fn other_files_stay_as_they_are() {
        let foreign = program("/lib64/ld-linux-x86-64.so.2", 60);
        let text = format!("{INTERPRETER}xxx\0").into_bytes();
        for before in [foreign, text, b"\x7fELF".to_vec()] {
            let mut bytes = before.clone();
            assert!(!set_path(&mut bytes, INTERPRETER, Path::new("/x")).unwrap());
            assert_eq!(bytes, before);
        }
    }
}
