//! Which folder of a crate may import which.
//!
//! A *module* here is one that `lib.rs` (or `main.rs`) declares: a file, or a folder with all that is in it. A crate's
//! table lists its modules from the top down: a module imports only modules of the layers below its own, or of its own
//! layer without a circle. What only tests import does not count.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, iter,
    path::{Path, PathBuf},
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use walkdir::WalkDir;

/// A crate's folder, and its modules in layers, the one that everything may import last. An empty list of layers stands
/// for: any module may import any other, without a circle.
const CRATES: &[(&str, &[&[&str]])] = &[
    ("operator/report", &[]),
    ("shim/config", &[]),
    ("shim/node-check", &[]),
    ("vmm/host", &[]),
];

/// Module → the modules that it imports.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// The names at the start of each path of a `use` tree, or of a path, after the tokens `crate ::`.
fn first_names(tokens: &[TokenTree]) -> Vec<String> {
    match tokens.first() {
        Some(TokenTree::Ident(name)) => vec![name.to_string()],
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
            let inside: Vec<TokenTree> = group.stream().into_iter().collect();
            inside
                .split(|token| is_punctuation(token, ','))
                .flat_map(first_names)
                .collect()
        }
        _ => Vec::new(),
    }
}

fn is_punctuation(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punctuation) if punctuation.as_char() == character)
}

fn is_word(token: &TokenTree, word: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == word)
}

/// Whether these tokens begin with `::`.
fn is_path_separator(tokens: &[TokenTree]) -> bool {
    tokens.len() > 1 && tokens[..2].iter().all(|token| is_punctuation(token, ':'))
}

/// The number of tokens of the item that follows `#[cfg(test)]`, the attribute with it; none if there is none here.
fn test_item(tokens: &[TokenTree]) -> Option<usize> {
    let [hash, TokenTree::Group(attribute), rest @ ..] = tokens else {
        return None;
    };
    if !is_punctuation(hash, '#') || attribute.stream().to_string().replace(' ', "") != "cfg(test)" {
        return None;
    }
    let ends = |token: &TokenTree| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        other => is_punctuation(other, ';'),
    };
    Some(2 + rest.iter().position(ends)? + 1)
}

/// The tokens without items that are for tests alone.
fn without_tests(stream: TokenStream) -> Vec<TokenTree> {
    let tokens: Vec<TokenTree> = stream.into_iter().collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match test_item(&tokens[at..]) {
            Some(length) => at += length,
            None => {
                kept.push(tokens[at].clone());
                at += 1;
            }
        }
    }
    kept
}

/// Adds the names that follow `crate::` in `stream`, or as many `super::` as lead to the crate's root from a module
/// that lies `depth` below it.
fn collect(stream: TokenStream, depth: usize, names: &mut BTreeSet<String>) {
    let tokens = without_tests(stream);
    let mut at = 0;
    while at < tokens.len() {
        let rest = &tokens[at..];
        let supers = iter::successors(Some(0), |step| Some(step + 3))
            .take_while(|step| rest.len() > step + 2 && is_word(&rest[*step], "super"))
            .take_while(|step| is_path_separator(&rest[step + 1..]))
            .count();
        if is_word(&rest[0], "crate") && is_path_separator(&rest[1..]) {
            names.extend(first_names(&rest[3..]));
        } else if supers > 0 {
            if supers == depth {
                names.extend(first_names(&rest[3 * supers..]));
            }
            at += 3 * supers;
            continue;
        }
        if let [word, TokenTree::Ident(_), TokenTree::Group(body), ..] = rest
            && is_word(word, "mod")
        {
            collect(body.stream(), depth + 1, names);
            at += 3;
            continue;
        }
        if let TokenTree::Group(group) = &rest[0] {
            collect(group.stream(), depth, names);
        }
        at += 1;
    }
}

fn parse(path: &Path) -> TokenStream {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse()
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The modules that a crate's root declares, tests aside, and for each name that the root takes from one of them
/// (`pub use`) the module.
fn root(file: &Path) -> (BTreeSet<String>, BTreeMap<String, String>) {
    let (mut modules, mut taken) = (BTreeSet::new(), BTreeMap::new());
    let tokens = without_tests(parse(file));
    for at in 0..tokens.len() {
        match &tokens[at..] {
            [word, TokenTree::Ident(name), end, ..] if is_word(word, "mod") && is_punctuation(end, ';') => {
                modules.insert(name.to_string());
            }
            [word, TokenTree::Ident(module), path @ ..] if is_word(word, "use") && is_path_separator(path) => {
                let names = path.iter().take_while(|token| !is_punctuation(token, ';'));
                let names: TokenStream = names.cloned().collect();
                taken.extend(all_names(names).into_iter().map(|name| (name, module.to_string())));
            }
            _ => {}
        }
    }
    taken.retain(|_, module| modules.contains(module));
    (modules, taken)
}

fn all_names(stream: TokenStream) -> Vec<String> {
    let names = |token| match token {
        TokenTree::Ident(name) => vec![name.to_string()],
        TokenTree::Group(group) => all_names(group.stream()),
        _ => Vec::new(),
    };
    stream.into_iter().flat_map(names).collect()
}

/// What each module of the crate in this folder imports.
fn imports(folder: &Path) -> Imports {
    let source = folder.join("src");
    let (modules, taken) = root(&source.join("lib.rs"));
    let mut imports: Imports = modules.iter().map(|module| (module.clone(), BTreeSet::new())).collect();
    let files = WalkDir::new(&source)
        .into_iter()
        .map(|entry| entry.expect("the crate's files can be listed"));
    for entry in files.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "rs")) {
        let path = entry
            .path()
            .strip_prefix(&source)
            .expect("it is below")
            .with_extension("");
        let mut parts: Vec<&str> = path.iter().filter_map(|part| part.to_str()).collect();
        if parts.iter().any(|part| *part == "tests" || part.ends_with("_tests")) {
            continue;
        }
        if parts.last() == Some(&"mod") {
            parts.pop();
        }
        // The root itself, and programs beside it, import what they like.
        let Some(own) = parts.first().filter(|first| modules.contains(**first)) else {
            continue;
        };
        let mut names = BTreeSet::new();
        collect(parse(entry.path()), parts.len(), &mut names);
        let named = names
            .iter()
            .filter_map(|name| modules.get(name).or_else(|| taken.get(name)));
        let others = named.filter(|module| module != own).cloned();
        imports.get_mut(*own).expect("each module is there").extend(others);
    }
    imports
}

/// A way from a module back to itself, if there is one.
fn circle(imports: &Imports) -> Option<Vec<String>> {
    fn walk(imports: &Imports, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> Option<Vec<String>> {
        let here = way.last()?.clone();
        for next in &imports[&here] {
            if let Some(start) = way.iter().position(|module| module == next) {
                return Some(way[start..].to_vec());
            }
            if !done.contains(next) {
                way.push(next.clone());
                if let Some(circle) = walk(imports, way, done) {
                    return Some(circle);
                }
                way.pop();
            }
        }
        done.insert(here);
        None
    }
    let mut done = BTreeSet::new();
    imports
        .keys()
        .find_map(|start| walk(imports, &mut vec![start.clone()], &mut done))
}

/// What is wrong with a crate's imports by its layers, a sentence each.
fn wrong(imports: &Imports, layers: &[&[&str]]) -> Vec<String> {
    let mut wrong = Vec::new();
    if let Some(circle) = circle(imports) {
        wrong.push(format!("a circle: {} and back", circle.join(" imports ")));
    }
    if layers.is_empty() {
        return wrong;
    }
    let layer = |module: &str| layers.iter().position(|layer| layer.contains(&module));
    for (module, others) in imports {
        let Some(own) = layer(module) else {
            wrong.push(format!("the module {module} has no layer"));
            continue;
        };
        for other in others
            .iter()
            .filter(|other| layer(other).is_some_and(|other| other < own))
        {
            wrong.push(format!("{module} imports {other}, which is of a layer above"));
        }
    }
    let gone = layers
        .iter()
        .copied()
        .flatten()
        .filter(|module| !imports.contains_key(**module));
    wrong.extend(gone.map(|module| format!("the module {module} has a layer and is not there")));
    wrong
}

#[test]
fn a_module_imports_what_lies_below_it() {
    let top = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    for (folder, layers) in CRATES {
        let wrong = wrong(&imports(&top.join(folder)), layers);
        assert!(wrong.is_empty(), "{folder}:\n{}", wrong.join("\n"));
    }
}

/// The imports of a crate that is written here: its files, by their paths below `src`.
fn imports_of(files: &[(&str, &str)]) -> Imports {
    let folder = tempfile::tempdir().expect("a folder can be made");
    for (path, text) in files {
        let path = folder.path().join("src").join(path);
        fs::create_dir_all(path.parent().expect("it has a folder")).expect("a folder can be made");
        fs::write(path, text).expect("a file can be written");
    }
    imports(folder.path())
}

#[test]
fn every_form_of_an_import_is_seen() {
    let root = "use std::process::c; mod a; pub mod b; mod c; mod d; mod e; pub use d::{Deep, deeper::Name};";
    let below = imports_of(&[
        ("lib.rs", root),
        ("a/mod.rs", "use crate::{b::B, c::{self, C}};"),
        (
            "a/inner.rs",
            "fn f() { log!(\"{}\", crate::e::E); mod x { use super::super::super::d; } }",
        ),
        ("b.rs", "use super::c::C; use crate::Deep;"),
        (
            "c.rs",
            "#[cfg(test)] use crate::a::A; #[cfg(test)] mod tests { use crate::a::A; } use super::Name;",
        ),
        ("d.rs", ""),
        ("e.rs", "// crate::a\nconst TEXT: &str = \"crate::a\";"),
    ]);
    let seen = |module: &str| below[module].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(seen("a"), ["b", "c", "d", "e"]);
    assert_eq!(seen("b"), ["c", "d"]);
    assert_eq!(seen("c"), ["d"]);
    assert_eq!(seen("e"), Vec::<&str>::new());
    assert_eq!(circle(&below), None);
}

#[test]
fn a_circle_and_an_import_upwards_are_named() {
    let files = [
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "use crate::b::B;"),
        ("b/mod.rs", ""),
        ("b/inner.rs", "use crate::c::C;"),
        ("c.rs", "use crate::a::A;"),
    ];
    let below = imports_of(&files);
    assert_eq!(
        wrong(&below, &[&["a"], &["b"], &["d"]]),
        [
            "a circle: a imports b imports c and back",
            "the module c has no layer",
            "the module d has a layer and is not there"
        ]
    );
    assert_eq!(
        wrong(&below, &[&["a"], &["b", "c"]])[1..],
        ["c imports a, which is of a layer above"]
    );
}
