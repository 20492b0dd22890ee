//! The names of our handlers, which are those of the RuntimeClasses: `kata`, and `kata-...` for those with settings of
//! their own.

/// The handler with the settings of the nodes.
pub const KATA: &str = "kata";
/// What the names of all others begin with, so that none is taken for somebody else's.
pub const PREFIX: &str = "kata-";

/// The longest name: that of a label.
const LONGEST: usize = 63;

/// Why there can be no RuntimeClass of ours with this name, if so. It is a part of paths, of TOML and of labels.
#[must_use]
pub fn refusal(name: &str) -> Option<String> {
    let letter = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let own = name.strip_prefix(PREFIX).unwrap_or_default();
    let fits = own.starts_with(letter)
        && own.ends_with(letter)
        && own.chars().all(|other| letter(other) || other == '-')
        && name.len() <= LONGEST;
    (!fits).then(|| {
        format!(
            "{name:?} is not the name of a RuntimeClass of Sandpod's: it has to begin with `{PREFIX}`, followed by \
             lower-case letters, digits and dashes, with no dash at the end and {LONGEST} characters at most"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_a_part_of_a_path_and_is_nobody_elses() {
        for name in ["kata-large", "kata-2", "kata-a-b", &format!("kata-{}", "a".repeat(58))] {
            assert_eq!(refusal(name), None);
        }
        for name in [
            "kata",
            "kata-",
            "large",
            "runc",
            "kata-Large",
            "kata--a",
            "kata-a-",
            "kata-a.b",
            "kata-../x",
            "kata-\"]",
            &format!("kata-{}", "a".repeat(59)),
        ] {
            assert!(
                refusal(name).is_some_and(|why| why.contains(&format!("{name:?}"))),
                "{name}"
            );
        }
    }
}
