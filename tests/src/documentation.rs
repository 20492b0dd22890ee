//! Whether the documentation speaks of tests that exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The documents with tables whose last column names tests.
const DOCUMENTS: &[&str] = &["docs/pods.md", "docs/security.md"];

/// Every test that they name is one: a function of a crate, or a story by its name.
#[test]
fn the_tests_that_the_documentation_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let sources: String = ["agent", "operator", "shim", "tests", "vmm"]
        .into_iter()
        .flat_map(|folder| programs(&root.join(folder)))
        .map(|path| fs::read_to_string(path).expect("a source file"))
        .collect();
    // A function, or an entry of a table of stories.
    let exists = |name: &str| {
        let spellings = [
            format!("fn {name}("),
            format!("(\"{name}\","),
            format!(", \"{name}\","),
            format!(" \"{name}\",\n"),
        ];
        spellings.iter().any(|spelling| sources.contains(spelling))
    };
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join(document)).expect("the documentation");
        let named = tests_of(&text);
        assert!(named.len() > 20, "{document} was not understood: {named:?}");
        let missing: Vec<_> = named.into_iter().filter(|name| !exists(name)).collect();
        assert!(missing.is_empty(), "{document} names tests that are none: {missing:?}");
    }
}

/// What stands between backquotes in the last columns of a document's tables and could be the name of a test.
fn tests_of(document: &str) -> BTreeSet<&str> {
    let rows = document.lines().filter(|line| line.starts_with("| "));
    let last = rows.filter_map(|row| row.trim_end_matches(" |").rsplit(" | ").next());
    last.flat_map(|tests| tests.split('`').skip(1).step_by(2))
        .filter(|name| {
            name.contains('_')
                && name
                    .chars()
                    .all(|letter| letter == '_' || letter.is_ascii_alphanumeric())
        })
        .collect()
}

fn programs(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("a folder of sources")
        .flatten()
        .map(|entry| entry.path());
    entries
        .flat_map(|path| match path.extension() {
            Some(extension) if extension == "rs" => vec![path],
            _ if path.is_dir() => programs(&path),
            _ => Vec::new(),
        })
        .collect()
}
