//! What is in a release: the bill of materials, licences, and the same bytes each time.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    process::Command,
};

use cyclonedx_bom::{models::bom::Bom, validation::Validate};
use serde_json::Value;
use tests::{
    cluster::operator::INSTALLING,
    failure::{Failure, Result, Trying, claim, contains, same},
    places,
    run::{self, succeed},
};

use super::{VERSION, cluster_folder, desk, digests};

/// Our programs that are shipped, and what their crates are compiled for.
const SHIPPED: &[&str] = &[
    "--package=agent",
    "--package=installer",
    "--package=operator",
    "--package=shim",
];
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The bill of materials, as JSON.
fn bill() -> Result<Value> {
    let path = cluster_folder(&places::release()?).join(format!("sandpod-{VERSION}.cdx.json"));
    let what = path.display().to_string();
    let file = File::open(path).trying(format!("opening {what}"))?;
    serde_json::from_reader(file).map_err(|source| Failure::Json { what, source })
}

/// Each crate that is compiled into a shipped program, as `<name> <version>`: what cargo takes of the lock files.
fn crates() -> Result<BTreeSet<String>> {
    let virtiofsd = fs::canonicalize(places::virtiofsd()?).trying("looking for virtiofsd")?;
    let source = virtiofsd.ancestors().nth(2).map(|folder| folder.join("source"));
    let of_ours = tree(&places::workspace(), SHIPPED)?;
    Ok(&of_ours | &tree(&source.unwrap_or_default(), &[])?)
}

fn tree(folder: &Path, packages: &[&str]) -> Result<BTreeSet<String>> {
    let mut command = Command::new("cargo");
    command.args([
        "tree",
        "--locked",
        "--offline",
        "--prefix=none",
        "--format={p}",
        "--edges=normal",
    ]);
    command.args(["--target", TARGET]).args(packages).current_dir(folder);
    let text = succeed(&mut command, run::ORDINARY)?.text();
    // A line is `name v1.2.3`, with `(/folder)` where it is in no registry, `(proc-macro)`, or `(*)` the second time.
    let of_a_registry = text
        .lines()
        .filter(|line| !line.contains("(/") || line.starts_with("virtiofsd "));
    let names = of_a_registry.filter_map(|line| {
        let mut words = line.split(' ');
        Some(format!("{} {}", words.next()?, words.next()?.strip_prefix('v')?))
    });
    Ok(names.collect())
}

/// The Debian packages in the payload, as lines of its list have them: source, its version, package, its version.
fn debian() -> Result<Vec<[String; 4]>> {
    let path = places::payload()?.join("share/doc/debian-packages");
    let list = fs::read_to_string(path).trying("reading the payload's list of Debian packages")?;
    let parsed = list.lines().map(|line| {
        let words: Vec<_> = line.split([' ', '(', ')']).filter(|word| !word.is_empty()).collect();
        let four = <[&str; 4]>::try_from(words).map_err(|_| Failure::Claim(format!("not understood: {line:?}")))?;
        Ok(four.map(str::to_owned))
    });
    parsed.collect()
}

/// It is CycloneDX, and has every crate, Debian package, program and kernel, once, and the images by their digests.
pub fn bill_of_materials() -> Result {
    let bill = bill()?;
    let parsed = Bom::parse_json_value(bill.clone());
    let parsed = parsed.map_err(|error| Failure::Claim(format!("the bill of materials is no CycloneDX: {error}")))?;
    let checked = parsed.validate_version(parsed.spec_version);
    claim(checked.passed(), format!("the bill of materials: {checked:?}"))?;
    let components = bill["components"].as_array().cloned().unwrap_or_default();
    let text = |component: &Value, field: &str| component[field].as_str().unwrap_or_default().to_owned();
    let of = |prefix: &str| -> BTreeSet<String> {
        let with = components
            .iter()
            .filter(|component| text(component, "purl").starts_with(prefix));
        with.map(|component| format!("{} {}", text(component, "name"), text(component, "version")))
            .collect()
    };
    let missing = |wanted: &BTreeSet<String>, have: &BTreeSet<String>| wanted.difference(have).cloned().collect();
    let (crates, debian) = (crates()?, debian()?);
    claim(
        crates.len() > 300 && debian.len() > 30,
        "what is shipped was not understood",
    )?;
    let without: Vec<String> = missing(&crates, &of("pkg:cargo/"));
    same("crates that are not in it", without, Vec::<String>::new())?;
    let packages = debian
        .iter()
        .map(|[_, _, package, version]| format!("{package} {version}"))
        .collect();
    let without: Vec<String> = missing(&packages, &of("pkg:deb/debian/"));
    same("Debian packages that are not in it", without, Vec::<String>::new())?;
    let linked: BTreeSet<_> = of("pkg:deb/debian/")
        .iter()
        .filter_map(|each| Some(each.split_once(' ')?.0.to_owned()))
        .collect();
    for archive in ["libc6-dev", "libseccomp-dev", "libcap-ng-dev"] {
        claim(linked.contains(archive), format!("{archive} is linked, and not in it"))?;
    }
    let manifest =
        fs::read_to_string(places::payload()?.join("manifest.json")).trying("reading the guest's manifest")?;
    for kernel in of("pkg:generic/linux@") {
        contains(
            "the guest's kernel",
            &manifest,
            &kernel.replace("linux ", "linux-source-6.12 "),
        )?;
    }
    same("kernels", of("pkg:generic/linux@").len(), 1)?;
    for [name, digest] in digests(&cluster_folder(&places::release()?))? {
        let listed = components
            .iter()
            .any(|component| component["bom-ref"] == format!("{name}@{digest}"));
        same(&format!("whether {name} is in it"), listed, !name.contains("charts"))?;
    }
    // Whatever is told of is there, once.
    let known: Vec<String> = components.iter().map(|component| text(component, "bom-ref")).collect();
    same(
        "names that are given twice",
        known.iter().collect::<BTreeSet<_>>().len(),
        known.len(),
    )?;
    let edges = bill["dependencies"].as_array().into_iter().flatten();
    let pointed = edges.flat_map(|edge| edge["dependsOn"].as_array().into_iter().flatten());
    let unknown: Vec<_> = pointed
        .filter(|name| !known.iter().any(|known| *name == known))
        .collect();
    same("dependencies on what is not there", unknown, Vec::<&Value>::new())
}

/// In the release, in the archive for one node and in both images.
pub fn licences() -> Result {
    let release = places::release()?;
    let folder = cluster_folder(&release).join("licences");
    let read = |name: &str| fs::read_to_string(folder.join(name)).trying(format!("reading {name} of the licences"));
    let (texts, sources) = (read("crates.txt")?, read("THIRD-PARTY.md")?);
    let told: BTreeSet<&str> = texts
        .lines()
        .filter_map(|line| Some(line.split_once(", ")?.0))
        .collect();
    let without: Vec<_> = crates()?
        .into_iter()
        .filter(|name| !told.contains(name.as_str()))
        .collect();
    same("crates without a licence", without, Vec::<String>::new())?;
    for [source, version, package, _] in debian()? {
        claim(
            read(&format!("debian/{package}.txt"))?.len() > 100,
            format!("the licence of {package} is empty"),
        )?;
        let place = format!("https://snapshot.debian.org/package/{source}/{version}/ |");
        contains("where sources are had", &sources, &place)?;
    }
    contains(
        "where sources are had",
        &sources,
        "| the guest's kernel | https://snapshot.debian.org/package/linux-6.12/",
    )?;
    contains(
        "the LGPL",
        &read("common/LGPL-2.1")?,
        "GNU LESSER GENERAL PUBLIC LICENSE",
    )?;
    contains("the GPL", &read("common/GPL-2")?, "GNU GENERAL PUBLIC LICENSE")?;
    let patch = "guest-kernel/kernel-pci-tables.patch";
    let ours = fs::read_to_string(places::workspace().join("deploy/guest/kernel-pci-tables.patch"));
    same("a patch of the kernel", read(patch)?, ours.trying("reading a patch")?)?;
    let node = release.join(format!("sandpod-{VERSION}-x86_64.tar.gz"));
    let inside = listed("tar --list --gzip --file \"$0\"", &node, "")?;
    let folder = format!("sandpod-{VERSION}-x86_64");
    for name in [
        "install.sh",
        "sandpod-installer",
        "payload/MANIFEST",
        "licences/THIRD-PARTY.md",
        "licences/LICENSE",
    ] {
        contains("the archive for one node", &inside, &format!("\n{folder}/{name}\n"))?;
    }
    let cluster = cluster_folder(&release);
    for [name, digest] in digests(&cluster)?.iter().filter(|[name, _]| !name.contains("charts")) {
        let archive = cluster.join(format!("images/{}.tar", name.trim_start_matches("sandpod.io/")));
        let blob = "tar --extract --to-stdout --file \"$0\" \"./blobs/sha256/${1#sha256:}\"";
        let manifest = listed(blob, &archive, digest)?;
        let manifest: Value = serde_json::from_str(&manifest).map_err(|source| Failure::Json {
            what: format!("the manifest of {name}"),
            source,
        })?;
        let layer = manifest["layers"][0]["digest"].as_str().unwrap_or_default();
        let inside = listed(&format!("{blob} | tar --list --gzip"), &archive, layer)?;
        for text in [
            "THIRD-PARTY.md",
            "crates.txt",
            "debian/libc6-dev.txt",
            "common/LGPL-2.1",
        ] {
            contains(name, &inside, &format!("\nlicenses/{text}\n"))?;
        }
    }
    Ok(())
}

/// What a script prints of an archive, with a line end before and after.
fn listed(script: &str, archive: &Path, word: &str) -> Result<String> {
    let mut shell = Command::new("sh");
    let output = succeed(shell.args(["-c", script]).arg(archive).arg(word), run::ORDINARY)?;
    Ok(format!("\n{}\n", output.text()))
}

/// Both manifests have each image by the digest that the archive has, and none by its tag.
pub fn manifests() -> Result {
    let folder = cluster_folder(&places::release()?);
    let shipped = digests(&folder)?;
    for (file, expected) in [
        ("install.yaml", &["sandpod.io/operator", "sandpod.io/installer"][..]),
        ("monitor.yaml", &["sandpod.io/installer"]),
    ] {
        let text = fs::read_to_string(folder.join(file)).trying(format!("reading {file} of the release"))?;
        let named: BTreeSet<_> = text
            .split_whitespace()
            .filter(|word| word.starts_with("sandpod.io/") && word.contains([':', '@']))
            .map(str::to_owned)
            .collect();
        let by_digest = shipped
            .iter()
            .filter(|[name, _]| expected.contains(&name.as_str()))
            .map(|[name, digest]| format!("{name}@{digest}"))
            .collect();
        same(&format!("the images of {file}"), named, by_digest)?;
    }
    Ok(())
}

/// Made once more of the same, every file is the same.
pub fn reproducible() -> Result {
    let folder = desk()?;
    let again = folder.path().join("again");
    let licences = cluster_folder(&places::release()?).join("licences");
    let mut script = Command::new(places::workspace().join("deploy/release/release.sh"));
    script.args([
        places::binaries()?,
        places::payload()?,
        places::operator_images()?,
        licences,
    ]);
    succeed(script.arg(places::virtiofsd()?).arg(&again), INSTALLING)?;
    let sums = |release: &Path| -> Result<[String; 2]> {
        let read = |folder: &Path| fs::read_to_string(folder.join("SHA256SUMS")).trying("reading sums");
        Ok([read(release)?, read(&cluster_folder(release))?])
    };
    same("the sums", sums(&again)?, sums(&places::release()?)?)
}
