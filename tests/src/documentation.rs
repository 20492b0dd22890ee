//! Whether the documentation speaks of tests that exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Every test that `docs/pods.md` names is one: a function of a crate, or a story by its name.
#[test]
fn the_tests_that_the_documentation_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let table = fs::read_to_string(root.join("docs/pods.md")).expect("the documentation");
    let sources: String = ["tests", "shim", "agent", "vmm"]
        .into_iter()
        .flat_map(|folder| programs(&root.join(folder)))
        .map(|path| fs::read_to_string(path).expect("a source file"))
        .collect();
    let rows = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| field"));
    let named: BTreeSet<&str> = rows
        .filter_map(|row| row.trim_end_matches(" |").rsplit(" | ").next())
        .flat_map(|tests| tests.split('`').skip(1).step_by(2))
        .collect();
    assert!(named.len() > 40, "the table was not understood: {named:?}");
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
    let missing: Vec<_> = named.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
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
