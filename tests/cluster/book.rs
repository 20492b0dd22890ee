//! `docs/operator.md` from its beginning to its end: every command of the page is run, on a real node or, where a
//! package is shown that a node would have only one of, on an API server alone; and what the page says is printed there
//! is printed.

use std::{fs, os::unix::fs::symlink, process::Command, time::Duration};

use libtest_mimic::Trial;
use operator::api::KataConfigStatus;
use serde_json::Value;
use tempfile::TempDir;
use tests::{
    cluster::Cluster,
    failure::{Failure, Result, Trying, claim, same},
    kubernetes::ApiServer,
    places,
    run::{self, finish, refusal},
    suite,
};

use self::page::{Block, Placed};
use crate::life::newer_images;

mod page;

/// A story and its name.
type Story = (&'static str, fn() -> Result);

const STORIES: &[Story] = &[
    ("every_reason_and_every_error_has_its_cure", cures),
    ("every_excerpt_is_a_status", excerpts),
    ("every_command_does_what_the_page_says", commands),
];

/// The headings under which other packages than the manifest are shown, and what only a cluster with them has: on an
/// API server alone.
const ALONE: &[&str] = &[
    "By Helm",
    "By the Operator Lifecycle Manager",
    "With Node Feature Discovery",
];

/// Commands that are not run, by their beginnings, and why.
const NOT_RUN: &[(&str, &str)] = &[
    ("make images", "the images are what this is run with"),
    ("make release", "as are the release's files"),
    (
        "sandpod-0.1.0-cluster/push.sh",
        "that registry is in nobody's network; release/from_an_archive_to_a_pod pushes to one",
    ),
    (
        "buildah build --file deploy/olm/catalog.Dockerfile",
        "OLM's own server, with which the catalog's image begins, is in a registry that no test asks",
    ),
    (
        "kubectl get csv",
        "what makes a service version succeed are OLM's controllers, which are in the same registry",
    ),
];

/// The file on the desk that says where buildah keeps images.
const STORAGE: &str = "storage.conf";

/// The heading under which a newer release is there.
const UPGRADING: &str = "Upgrading";

/// How long a command of the page may take: it waits for ten minutes at most where it says so, and here for what a
/// loaded machine takes.
const DEADLINE: Duration = Duration::from_secs(300);

/// The stories as trials.
pub fn trials() -> impl Iterator<Item = Trial> {
    STORIES
        .iter()
        .map(|(name, tell)| suite::trial(format!("book/{name}"), *tell))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(places::workspace().join(path)).trying(format!("reading {path}"))
}

fn the_page() -> Result<Vec<Placed>> {
    claim(page::examples(), "pages are not read as they should be")?;
    Ok(page::blocks(&read("docs/operator.md")?))
}

/// The words of a source between two others that look like `This`.
fn names(source: &str, from: &str, to: &str, quoted: bool) -> Result<Vec<String>> {
    let inside = source
        .split_once(from)
        .and_then(|(_, rest)| rest.split_once(to))
        .map(|(inside, _)| inside);
    let inside = inside.ok_or_else(|| Failure::Claim(format!("there is no {from:?} .. {to:?}")))?;
    let words = inside.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let words: Vec<String> = match quoted {
        true => words
            .flat_map(|line| line.split('"').skip(1).step_by(2))
            .map(str::to_owned)
            .collect(),
        false => words.map(|line| line.trim_end_matches(',').to_owned()).collect(),
    };
    let is_name = |word: &&String| {
        word.starts_with(|first: char| first.is_ascii_uppercase())
            && word.chars().all(|each| each.is_ascii_alphabetic())
    };
    Ok(words.iter().filter(is_name).cloned().collect())
}

/// Each reason that the condition can have and each code of the installer's is a row's.
fn cures() -> Result {
    let page = read("docs/operator.md")?;
    let mut known = names(
        &read("operator/src/decide/status.rs")?,
        "fn words(",
        "fn calls_for_help(",
        true,
    )?;
    known.retain(|word| !["Existing", "Adding", "Removing", "Performing"].contains(&word.as_str()));
    let codes = names(&read("operator/report/src/lib.rs")?, "pub enum Code {", "\n}", false)?;
    claim(
        known.len() >= 9 && codes.len() >= 20,
        format!("not understood: {known:?} {codes:?}"),
    )?;
    known.extend(codes);
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let explained = |word: &String| {
        let quoted = format!("`{word}`");
        rows.iter()
            .any(|row| row.split(" | ").next().is_some_and(|cell| cell.contains(&quoted)))
    };
    let missing: Vec<_> = known.iter().filter(|word| !explained(word)).collect();
    same("without a cure", missing, Vec::<&String>::new())
}

/// What the page shows of a status has the API's own fields.
fn excerpts() -> Result {
    let mut count = 0;
    for placed in the_page()? {
        let Block::Excerpt(text) = placed.block else { continue };
        let at = |error: &dyn std::fmt::Display| Failure::Claim(format!("line {}: {error}", placed.line));
        let excerpt: Value = serde_saphyr::from_str(&text).map_err(|error| at(&error))?;
        let status: KataConfigStatus = serde_saphyr::from_str(&text).map_err(|error| at(&error))?;
        let status = serde_json::to_value(status).map_err(|error| at(&error))?;
        for (field, value) in excerpt.as_object().into_iter().flatten() {
            same(&format!("line {}: {field}", placed.line), &status[field], value)?;
        }
        count += 1;
    }
    same("the excerpts", count, 8)
}

fn commands() -> Result {
    let mut desk = Desk::new()?;
    for placed in the_page()? {
        match placed.block {
            Block::Excerpt(_) => {}
            Block::File { name, text } => {
                fs::write(desk.folder.path().join(&name), text).trying(format!("writing {name}"))?
            }
            Block::Session(session) => {
                for command in session {
                    desk.run(&placed.heading, &command)?;
                }
            }
        }
    }
    let unused: Vec<_> = NOT_RUN
        .iter()
        .filter(|(beginning, _)| !desk.left_out.contains(beginning))
        .collect();
    claim(unused.is_empty(), format!("not on the page: {unused:?}"))
}

/// Where a reader of the page sits: a folder like a checkout, and clusters as they are needed.
struct Desk {
    cluster: Option<Cluster>,
    alone: Option<ApiServer>,
    folder: TempDir,
    left_out: Vec<&'static str>,
    /// What is on the desk is of a newer release.
    upgraded: bool,
}

impl Desk {
    fn new() -> Result<Desk> {
        let folder = tempfile::Builder::new()
            .prefix("sandpod-desk-")
            .tempdir_in("/var/tmp")
            .trying("making a desk")?;
        for part in ["deploy", "target"] {
            symlink(places::workspace().join(part), folder.path().join(part)).trying("furnishing the desk")?;
        }
        // Images that are built are kept here, not among the machine's.
        let store = folder.path().join("images").display().to_string();
        let storage = format!("[storage]\ndriver = \"vfs\"\ngraphroot = \"{store}\"\nrunroot = \"{store}/run\"\n");
        fs::write(folder.path().join(STORAGE), storage).trying("furnishing the desk")?;
        Ok(Desk {
            cluster: None,
            alone: None,
            folder,
            left_out: Vec::new(),
            upgraded: false,
        })
    }

    /// Runs a command as its reader would, and compares.
    fn run(&mut self, heading: &str, step: &page::Command) -> Result {
        if let Some((beginning, _)) = NOT_RUN.iter().find(|(beginning, _)| step.text.starts_with(beginning)) {
            self.left_out.push(beginning);
            return Ok(());
        }
        if heading == UPGRADING && !self.upgraded && step.text.starts_with("kubectl apply") {
            self.newer_release()?;
        }
        let mut command = self.command(heading, step)?;
        let output = finish(&mut command, None, DEADLINE)?;
        let told = |why: String| Failure::Claim(format!("line {} of the page: {why}", step.line));
        if output.code != 0 {
            return Err(told(refusal(&command, &output).to_string()));
        }
        let printed = output.text();
        if !step.output.is_empty() && !page::printed(&step.output, &printed) {
            let expected = step.output.join("\n");
            return Err(told(format!(
                "`{}` is to print\n{expected}\nand printed\n{printed}",
                step.text
            )));
        }
        Ok(())
    }

    fn command(&mut self, heading: &str, step: &page::Command) -> Result<Command> {
        // Who watches sees the same again and again, until interrupted.
        let text = step
            .text
            .strip_prefix("watch ")
            .map_or(step.text.clone(), |watched| format!("sh -c {watched}"));
        // Where root's own programs are, such as a node's systemctl.
        let path = if step.on_node {
            "PATH=/usr/local/sbin:$PATH; "
        } else {
            ""
        };
        let script = format!("{path}cd {} && {text}", self.folder.path().display());
        let mut command = match (step.on_node, ALONE.contains(&heading)) {
            (true, _) => self.cluster()?.node().command("sh"),
            (false, alone) => {
                let kubeconfig = match alone {
                    true => self.alone()?.kubeconfig(),
                    false => self.cluster()?.api().kubeconfig(),
                };
                let mut command = Command::new("sh");
                command.env("KUBECONFIG", kubeconfig).env("HOME", self.folder.path());
                command.env("CONTAINERS_STORAGE_CONF", self.folder.path().join(STORAGE));
                command.env("PATH", format!("{}:/usr/bin:/bin", places::peers()?.display()));
                command
            }
        };
        command.args(["-c", &script]);
        Ok(command)
    }

    /// Lays a newer release on the desk: its images are on the node, its manifest makes another pod of the controller.
    fn newer_release(&mut self) -> Result {
        let images = tempfile::tempdir().trying("making a folder for newer images")?;
        let version = newer_images(images.path())?;
        self.cluster()?.load_operator_images(images.path())?;
        let (ours, desk) = (places::workspace().join("deploy"), self.folder.path().join("deploy"));
        fs::remove_file(&desk).trying("clearing the desk")?;
        fs::create_dir(&desk).trying("furnishing the desk")?;
        for entry in fs::read_dir(&ours).trying("listing deploy")?.flatten() {
            symlink(entry.path(), desk.join(entry.file_name())).trying("furnishing the desk")?;
        }
        let manifest = desk.join("install.yaml");
        fs::remove_file(&manifest).trying("clearing the desk")?;
        let text = read("deploy/install.yaml")?;
        let newer = text.replacen(
            "        env:\n",
            "        env:\n        - name: RELEASE\n          value: newer\n",
            1,
        );
        claim(newer != text, "the manifest has no environment")?;
        fs::write(&manifest, newer).trying("writing the newer manifest")?;
        let release = format!("sandpod-{}-cluster/VERSION", env!("CARGO_PKG_VERSION"));
        fs::write(self.folder.path().join(release), version).trying("writing the newer version")?;
        self.upgraded = true;
        Ok(())
    }

    fn cluster(&mut self) -> Result<&Cluster> {
        match &mut self.cluster {
            Some(cluster) => Ok(cluster),
            none => Ok(none.insert(Cluster::start()?)),
        }
    }

    /// An API server that knows what OLM and NFD define.
    fn alone(&mut self) -> Result<&ApiServer> {
        let server = match &mut self.alone {
            Some(server) => server,
            none => none.insert(prepared()?),
        };
        server.end_namespaces()?;
        Ok(server)
    }
}

fn prepared() -> Result<ApiServer> {
    let server = ApiServer::start()?;
    let definitions = places::peers()?.with_file_name("share").display().to_string();
    // Larger than what apply may keep in an annotation.
    server.kubectl(["apply", "--server-side", "--filename", &definitions])?;
    server.wait_for("condition=Established", &["crd", "--all"], run::ORDINARY)?;
    server.kubectl(["create", "namespace", "olm"])?;
    Ok(server)
}
