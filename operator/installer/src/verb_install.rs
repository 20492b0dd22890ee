//! `install`: this payload's version becomes the current one, and the CRI has the handler.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use config::Config;

use super::{
    Run, classes,
    cri::{Cri, HANDLER},
    daemon::{Author, Daemon},
    dropin::{self, DropIn, Format, MARK, Wanted},
    dry_run,
    effective::{self, Baseline},
    error::{InstallError, Result},
    files, imports,
    lock::NodeLock,
    merged, preflight,
    restart::restart,
    selinux,
    served::Served,
    state::{Edit, Pending, State},
    step,
    verb_uninstall::clear,
    versions,
};
use crate::report::Phase;

/// What the look at the node has brought.
struct Job {
    cri: Cri,
    /// The handlers that it shall have.
    handlers: BTreeSet<String>,
    /// Those and the ones that it has had of us.
    ours: BTreeSet<String>,
    /// Whether it serves the handlers already; none where it does not tell.
    served: Option<bool>,
    /// What it is like before anything is changed.
    baseline: Baseline,
    /// The name of the version to install.
    version: String,
    /// It is there already, as it should be.
    intact: bool,
    /// The text of the drop-in with the handlers.
    drop_in: String,
    /// What containerd's main file has to import.
    pattern: String,
    /// Files outside the prefix that are not as they should be.
    changes: Vec<Change>,
}

/// A file outside the prefix that is to change.
struct Change {
    file: DropIn,
    before: Option<String>,
}

/// Installs. Whatever fails is undone.
///
/// # Errors
/// Why the node is not fit, or what failed.
pub fn install(run: &mut Run) -> Result<Phase> {
    let lock = NodeLock::take(&run.layout.host)?;
    step("checking the node");
    run.sweep_scratch(&lock)?;
    let job = check(run, &lock)?;
    let mut state = run.layout.load_or_make()?;
    if let Err(error) = place(run, &job) {
        return Err(undone(error, forsake(run, &state, &job)));
    }
    let changed = change(run, &job, &mut state)? | versions::protect_locks(&run.layout)?;
    step("sweeping old versions");
    let keep = [Some(job.version.as_str()), state.previous.as_deref()];
    let keep: Vec<_> = keep.into_iter().flatten().collect();
    let swept = versions::sweep(&run.layout, &keep)?;
    run.report.changed = changed || swept || !job.intact;
    Ok(Phase::Installed)
}

/// Looks at everything that could be in the way. Changes nothing.
fn check(run: &mut Run, lock: &NodeLock) -> Result<Job> {
    let state = run.layout.load()?;
    let cri = run.cri(None)?;
    preflight::refuse_old(&cri)?;
    let payload = run
        .payload
        .as_ref()
        .ok_or(InstallError::Usage("an install needs --payload"))?;
    let version = payload.name.clone();
    let base = payload.text("configuration.toml")?;
    let configuration = run.options.configuration.clone();
    let config = run.judge(cri.daemon.kind(), base.as_deref(), Some(&configuration))?;
    run.refuse_other_prefix()?;
    preflight::refuse_open(&run.layout)?;
    let had = run.handlers()?;
    let classes = class_files(run, &cri, &config, &had)?;
    let handlers = classes::handlers(classes.keys());
    let format = merged::format(&run.layout.host, cri.daemon)?;
    let edit = edit(run, cri.daemon, format, &handlers)?;
    let mut wanted = dropin::all(
        cri.daemon,
        format,
        &Wanted {
            prefix: &run.layout.prefix,
            level: run.options.log_level,
            configuration: &configuration,
            classes: &classes,
        },
    );
    let intact = versions::inspect(&run.layout, &version).is_ok();
    if let Some(payload) = run.payload.as_ref().filter(|_| !intact) {
        preflight::refuse_full(&run.layout, payload)?;
    }
    let written = state.map(|state| state.written).unwrap_or_default();
    let gone = written.keys().filter_map(|path| classes::name_of(path));
    wanted.extend(gone.filter(|name| !classes.contains_key(name)).map(|name| DropIn {
        place: classes::place(&name),
        text: None,
    }));
    let mut changes = Vec::new();
    for file in wanted.clone() {
        let before = files::read_text(&run.layout.host.at(&*file.place.path))?;
        match verdict(&file, before.as_deref(), &written) {
            Verdict::Same => {}
            Verdict::Change => changes.push(Change { file, before }),
            // Pods of the RuntimeClass would have other settings than it says.
            Verdict::Theirs if classes::name_of(Path::new(&*file.place.path)).is_some() => {
                return Err(InstallError::ForeignFile {
                    path: PathBuf::from(&*file.place.path),
                });
            }
            Verdict::Theirs => run.warn(Some(format!("{} was edited; it stays as it is", file.place.path))),
        }
    }
    if let Some((file, before)) = edit {
        wanted.push(file.clone());
        changes.push(Change { file, before });
    }
    if changes.iter().any(|change| change.file.place.of_cri) {
        dry_run::validate(&run.layout.host, &lock.folder, &cri, &wanted)?;
    }
    let names = classes.keys().cloned().collect();
    let drop_in = dropin::handler(cri.daemon, format, &run.layout.prefix, &names);
    let drop_in = drop_in.text.unwrap_or_default();
    let ours = had.union(&handlers).cloned().collect();
    let served = cri.handlers()?;
    let proven = |served: Served| served.prove(cri.daemon.name(), &handlers, &drop_in).is_ok();
    Ok(Job {
        served: served.map(proven),
        baseline: cri.baseline(&ours)?,
        handlers,
        ours,
        pattern: imports::pattern(cri.daemon.site(), format),
        cri,
        version,
        intact,
        drop_in,
        changes,
    })
}

/// The files of the RuntimeClasses with settings of their own: those that are asked for, and those that are not any
/// more, but that pods of this node use.
fn class_files(run: &mut Run, cri: &Cri, config: &Config, had: &BTreeSet<String>) -> Result<classes::Files> {
    let base = preflight::base(&run.layout, cri.daemon.kind());
    let mut texts = classes::Files::new();
    for (name, settings) in &run.options.runtime_classes {
        classes::refuse_invalid(name, config.with(settings))?;
        texts.insert(name.clone(), classes::text(&base, settings));
    }
    let asked_for = |name: &str| name == HANDLER || run.options.runtime_classes.contains_key(name);
    let left: BTreeSet<_> = had.iter().filter(|name| !asked_for(name)).cloned().collect();
    let mut warnings = Vec::new();
    for sandbox in cri.ready_sandboxes(&left)? {
        if texts.contains_key(&sandbox.handler) {
            continue;
        }
        let place = classes::place(&sandbox.handler);
        let text = files::read_text(&run.layout.host.at(&*place.path))?;
        warnings.push(format!(
            "the handler {} is not asked for any more; it stays until the installer runs again, because of pods such as {}",
            sandbox.handler, sandbox.pod
        ));
        texts.insert(sandbox.handler, text.unwrap_or_else(|| classes::text(&base, "")));
    }
    run.report.warnings.extend(warnings);
    Ok(texts)
}

/// The main file of containerd's configuration with one import more, and as it was, if it needs one and may have it.
fn edit(
    run: &Run,
    daemon: Daemon,
    format: Format,
    handlers: &BTreeSet<String>,
) -> Result<Option<(DropIn, Option<String>)>> {
    let host = &run.layout.host;
    let site = daemon.site();
    match merged::refuse_foreign(host, daemon, format, handlers) {
        Err(InstallError::NotImported { .. }) if run.options.add_imports && site.author == Author::Administrator => {
            imports::edit(host, site, format).map(Some)
        }
        checked => checked.map(|()| None),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Change,
    /// An administrator's own, or one that he has edited.
    Theirs,
}

/// What is to be done about a file. The CRI's and those of RuntimeClasses are ours alone; the others lie among the
/// administrator's.
fn verdict(file: &DropIn, before: Option<&str>, written: &BTreeMap<PathBuf, String>) -> Verdict {
    match (before, &file.text) {
        (None, None) => Verdict::Same,
        (Some(before), Some(text)) if before == text => Verdict::Same,
        (None, Some(_)) => Verdict::Change,
        (Some(before), _) if file.place.of_cri && before.starts_with(MARK) => Verdict::Change,
        (Some(before), _) if classes::is_ours(&file.place, before) => Verdict::Change,
        (Some(before), _) if written.get(Path::new(&*file.place.path)) == Some(&files::sha256(before.as_bytes())) => {
            Verdict::Change
        }
        // A name that we would use too, where we want nothing.
        (Some(_), None) => Verdict::Same,
        (Some(_), Some(_)) => Verdict::Theirs,
    }
}

/// The version's files, with their name, tried.
fn place(run: &mut Run, job: &Job) -> Result<()> {
    let Some(payload) = run.payload.take().filter(|_| !job.intact) else {
        return Ok(());
    };
    step(format_args!("staging {}", job.version));
    let selinux = selinux::Mode::of(&run.layout.host);
    let warning = versions::stage(&run.layout, &payload, selinux)?;
    run.warn(warning);
    step(format_args!("placing {}", job.version));
    versions::seal(&run.layout, &job.version)?;
    step(format_args!("trying {}", job.version));
    // QEMU finds its libraries by its own path, which the kernel tells in /proc: a folder that only stands for a node
    // has none.
    if !run.layout.host.at("/proc/self/exe").exists() {
        return Ok(());
    }
    let folder = run.layout.versions().join(&job.version);
    for program in ["bin/containerd-shim-kata-v2", "bin/qemu-system-x86_64", "virtiofsd"] {
        if payload.manifest.has(program) {
            starts(folder.join(program))?;
        }
    }
    Ok(())
}

/// A file system may be mounted without the right to execute, and a program may lack its libraries: better known before
/// pods are started.
fn starts(program: PathBuf) -> Result<()> {
    let why = match Command::new(&program).arg("--version").output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            format!(
                "it ended with {}: {}",
                output.status,
                said.lines().last().unwrap_or_default()
            )
        }
        Err(error) => error.to_string(),
    };
    Err(InstallError::DoesNotStart { program, why })
}

/// Takes away a version that did not get as far as to be used.
fn forsake(run: &mut Run, state: &State, job: &Job) -> Result<()> {
    let current = run.layout.current_version();
    if current.is_none() && state.pending.is_none() {
        return clear(run, state);
    }
    let keep = [current.as_deref(), state.previous.as_deref()];
    let keep: Vec<_> = keep
        .into_iter()
        .flatten()
        .filter(|name| *name != job.version || job.intact)
        .collect();
    versions::sweep(&run.layout, &keep).map(drop)
}

/// The first error, and the one that came while undoing what led to it.
fn undone(first: InstallError, then: Result<()>) -> InstallError {
    match then {
        Ok(()) => first,
        Err(then) => InstallError::NotUndone {
            first: first.into(),
            then: then.into(),
        },
    }
}

/// Makes the version the current one and the files as they should be, and restarts the CRI if it has to know. Whether
/// anything was done.
fn change(run: &mut Run, job: &Job, state: &mut State) -> Result<bool> {
    let current = run.layout.current_version();
    let flip = current.as_deref() != Some(&job.version);
    let left = state.pending.take();
    // After a death between a change and its restart the files are as they should be, and the CRI does not know of
    // them.
    let owed = left
        .as_ref()
        .is_some_and(|left| left.restart && left.boot_id == run.boot_id());
    let restart = owed || job.served == Some(false) || job.changes.iter().any(|change| change.file.place.of_cri);
    run.report.handler_seen = job.served;
    if !flip && !restart && job.changes.is_empty() && left.is_none() {
        return Ok(false);
    }
    let mut pending = left.unwrap_or_else(|| Pending {
        current,
        ..Pending::default()
    });
    pending.boot_id = run.boot_id();
    pending.restart = restart;
    for change in &job.changes {
        let path = PathBuf::from(&*change.file.place.path);
        if pending.files.contains_key(&path) {
            continue;
        }
        let known = state.written.get(&path).map(|sum| (path.clone(), sum.clone()));
        pending.written.extend(known);
        pending.files.insert(path, change.before.clone());
    }
    // After a death it is the one before that death: the CRI may have been restarted since.
    let baseline = pending.baseline.get_or_insert_with(|| job.baseline.clone()).clone();
    state.pending = Some(pending.clone());
    state.cri = Some(job.cri.daemon);
    run.layout.save(state)?;
    run.touched = true;
    let advanced = advance(run, job, state, flip, restart).and_then(|()| match restart {
        true => refuse_worse(run, job, &pending, &baseline),
        false => Ok(()),
    });
    if let Err(error) = advanced {
        return Err(undone(error, roll_back(run, job, state)));
    }
    if pending.current.as_deref() != Some(&job.version) {
        state.previous = pending.current;
    }
    state.pending = None;
    run.layout.save(state)?;
    Ok(true)
}

fn advance(run: &mut Run, job: &Job, state: &mut State, flip: bool, restart_it: bool) -> Result<()> {
    let name = job.cri.daemon.name();
    if flip {
        step(format_args!("making {} current", job.version));
        versions::make_current(&run.layout, Some(&job.version))?;
    }
    for change in &job.changes {
        let file = &change.file;
        let verb = if file.text.is_some() { "writing" } else { "removing" };
        step(format_args!("{verb} {}", file.place.path));
        put(run, job, state, change)?;
    }
    if restart_it {
        step(format_args!("restarting {name}"));
        run.report.restarted = true;
        restart(&job.cri, run.options.restart.as_deref())?;
    }
    step(format_args!("asking {name} for the handler {HANDLER}"));
    let Some(served) = job.cri.handlers()? else {
        run.warn(Some(format!(
            "{} does not tell its handlers; that it has `{HANDLER}` shows when a pod asks for it",
            job.cri.describe()
        )));
        run.report.handler_seen = None;
        return Ok(());
    };
    let proof = served.prove(name, &job.handlers, &job.drop_in);
    run.report.handler_seen = Some(proof.is_ok());
    proof
}

/// After the restart: the CRI is what it was before it, but for our handlers.
fn refuse_worse(run: &mut Run, job: &Job, pending: &Pending, before: &Baseline) -> Result<()> {
    let cri = job.cri.daemon.name();
    if misread(job, pending) {
        run.warn(Some(format!(
            "what {cri} makes of its configuration was not compared: the drop-in of an earlier Sandpod had another version \
             than the rest of it"
        )));
    } else {
        let now = job.cri.baseline(&job.ours)?;
        let parts = [(&before.config, &now.config), (&before.handlers, &now.handlers)];
        let mut told = parts
            .into_iter()
            .filter_map(|(before, now)| before.as_ref().zip(now.as_ref()));
        if let Some(path) = told.find_map(|(before, now)| effective::difference(before, now)) {
            return Err(InstallError::Differs { cri, path });
        }
    }
    job.cri.await_conditions(before)
}

/// Whether the drop-in that was there before had another version than belongs to the node: then the CRI may have left
/// out other files' sections, which it reads now.
fn misread(job: &Job, pending: &Pending) -> bool {
    let wanted = dropin::version_of(&job.drop_in);
    let mut folders = job.cri.daemon.site().folders.iter();
    folders.any(|folder| {
        let before = pending.files.get(Path::new(&*folder.handler.path)).cloned().flatten();
        let before = before.as_deref().and_then(dropin::version_of);
        before.is_some() && before != wanted
    })
}

fn put(run: &mut Run, job: &Job, state: &mut State, change: &Change) -> Result<()> {
    let file = &change.file;
    let place = run.layout.host.at(&*file.place.path);
    let path = PathBuf::from(&*file.place.path);
    let Some(text) = &file.text else {
        state.written.remove(&path);
        return files::remove(&place).map(drop);
    };
    if let Some(folder) = place.parent() {
        run.layout.make_folder(state, folder)?;
    }
    if file.place == job.cri.daemon.site().main_place() {
        let edit = Edit {
            before: change.before.clone(),
            sha256: files::sha256(text.as_bytes()),
            pattern: job.pattern.clone(),
        };
        // Known to have a line of ours before it has.
        state.edited.insert(path, edit);
        run.layout.save(state)?;
        let mode = imports::mode(&place)?;
        return files::replace(&place, text.as_bytes(), &run.layout.host.at(file.place.scratch), mode);
    }
    if !file.place.of_cri {
        // Known to be ours before it is there.
        state.written.insert(path, files::sha256(text.as_bytes()));
        run.layout.save(state)?;
    }
    files::replace(&place, text.as_bytes(), &run.layout.host.at(file.place.scratch), 0o644)
}

/// Puts back what was there before the change that is pending.
fn roll_back(run: &mut Run, job: &Job, state: &mut State) -> Result<()> {
    step("putting back what was there before");
    let pending = state.pending.clone().unwrap_or_default();
    let mut of_cri = false;
    for (path, before) in &pending.files {
        let place = run.layout.host.at(path);
        let known = dropin::place_of(job.cri.daemon, path);
        of_cri |= known.as_ref().is_none_or(|known| known.of_cri);
        let scratch = known.map_or_else(|| run.layout.root(), |known| run.layout.host.at(known.scratch));
        match before {
            Some(text) => files::replace(&place, text.as_bytes(), &scratch, imports::mode(&place)?)?,
            None => drop(files::remove(&place)?),
        }
        state.written.remove(path);
        state.edited.remove(path);
    }
    state.written.extend(pending.written);
    versions::make_current(&run.layout, pending.current.as_deref())?;
    // One that cannot be restarted now starts with the right files whenever it does.
    let restarted = match of_cri {
        true => {
            step(format_args!("restarting {}", job.cri.daemon.name()));
            restart(&job.cri, run.options.restart.as_deref())
        }
        false => Ok(()),
    };
    state.pending = None;
    if pending.current.is_none() {
        return clear(run, state).and(restarted);
    }
    run.layout.save(state)?;
    let keep = [pending.current.as_deref(), state.previous.as_deref()];
    let keep: Vec<_> = keep.into_iter().flatten().collect();
    versions::sweep(&run.layout, &keep)?;
    restarted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log_level::LogLevel;

    fn files_of(level: LogLevel) -> [DropIn; 2] {
        let wanted = Wanted {
            prefix: Path::new("/opt/sandpod"),
            level,
            configuration: "",
            classes: &BTreeMap::new(),
        };
        let mut files = dropin::all(Daemon::Containerd, Format::ContainerdV3, &wanted).into_iter();
        [files.next().unwrap(), files.next().unwrap()]
    }

    #[test]
    fn the_cris_file_is_always_made_right() {
        let [handler, _] = files_of(LogLevel::Info);
        let text = handler.text.clone().unwrap();
        let verdict = |before: Option<&str>| verdict(&handler, before, &BTreeMap::new());
        assert_eq!(verdict(None), Verdict::Change);
        assert_eq!(verdict(Some(&text)), Verdict::Same);
        assert_eq!(verdict(Some("# Sandpod: of another version\n")), Verdict::Change);
    }

    #[test]
    fn an_administrators_file_is_left_alone() {
        let ([_, off], [_, on]) = (files_of(LogLevel::Info), files_of(LogLevel::Debug));
        let text = on.text.clone().unwrap();
        let ours = BTreeMap::from([(PathBuf::from(&*on.place.path), files::sha256(text.as_bytes()))]);
        let none = BTreeMap::new();
        assert_eq!(verdict(&on, None, &none), Verdict::Change);
        assert_eq!(verdict(&on, Some("mine"), &none), Verdict::Theirs);
        assert_eq!(verdict(&on, Some("edited"), &ours), Verdict::Theirs);
        assert_eq!(verdict(&off, Some(&text), &ours), Verdict::Change);
        assert_eq!(verdict(&off, Some("edited"), &ours), Verdict::Same);
        assert_eq!(verdict(&off, None, &ours), Verdict::Same);
    }
}
