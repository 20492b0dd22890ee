//! `uninstall`: nothing of ours is left, and everything else is as it was.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{
    Run, classes,
    cri::{Cri, HANDLER},
    daemon::Daemon,
    dropin::{self, DropIn, Format, MARK, Place, Wanted},
    error::{InstallError, Result},
    files, imports,
    lock::NodeLock,
    restart::restart,
    state::{Pending, State},
    step, versions,
};
use crate::{log_level::LogLevel, report::Phase};

/// How long a shim may take to end after its pod was removed.
const SHIM_END: Duration = Duration::from_secs(10);
/// How often that is looked for: nobody announces the end of a lock.
const PACE: Duration = Duration::from_millis(50);

/// Uninstalls; a node without Sandpod is left as it is.
///
/// # Errors
/// Pods run, or something cannot be taken away.
pub fn uninstall(run: &mut Run) -> Result<Phase> {
    let lock = NodeLock::take(&run.layout.host)?;
    step("checking the node");
    let swept = run.sweep_scratch(&lock)?;
    run.refuse_other_prefix()?;
    let remembered = run.layout.load();
    let damaged = matches!(remembered, Err(InstallError::ConfigInvalid { .. }));
    let state = match damaged {
        true => Some(guess(run)?),
        false => remembered?,
    };
    let of_cri = present(run)?;
    if state.is_none() && of_cri.is_empty() {
        run.report.changed = swept;
        return Ok(Phase::Uninstalled);
    }
    let state = state.unwrap_or_default();
    let owed = state
        .pending
        .as_ref()
        .is_some_and(|left| left.restart && left.boot_id == run.boot_id());
    // A CRI without our drop-in has nothing to be asked, and need not be there.
    let cri = match of_cri.is_empty() && !owed {
        true => None,
        false => Some(connected(run, state.cri)?),
    };
    let handlers = run.handlers()?;
    refuse_in_use(run, cri.as_ref(), &handlers)?;
    let mut state = match damaged {
        true => run.layout.save(&state).map(|()| state)?,
        false => run.layout.load_or_make()?,
    };
    run.touched = true;
    match cri {
        Some(cri) => disconnect(run, &cri, &of_cri, &handlers, &mut state)?,
        None => take_lines_out(run, &mut state)?,
    }
    remove_written(run, &state)?;
    step(format_args!("removing {}", run.layout.prefix.display()));
    clear(run, &state)?;
    run.report.changed = true;
    Ok(Phase::Uninstalled)
}

/// The CRI that the last install was for, whatever the kubelet uses by now; another one where another kind was asked
/// for.
fn connected(run: &mut Run, last: Option<Daemon>) -> Result<Cri> {
    match last.filter(|last| run.options.cri.is_none_or(|kind| kind == last.kind())) {
        Some(daemon) => {
            let cri = Cri::connect(&run.layout.host, daemon)?;
            run.report.facts.cri = cri.describe();
            Ok(cri)
        }
        None => run.cri(None),
    }
}

/// What can be said of an installation whose state is damaged: the prefix is ours, and a file among the
/// administrator's that has our text.
fn guess(run: &mut Run) -> Result<State> {
    let prefix = run.layout.prefix.clone();
    run.warn(Some(format!(
        "{} is damaged: what is not in {} and not known by its text stays",
        prefix.join("state.json").display(),
        prefix.display()
    )));
    let mut state = State {
        made: vec![prefix.clone()],
        ..State::default()
    };
    let wanted = Wanted {
        prefix: &prefix,
        level: LogLevel::Debug,
        configuration: "",
        classes: &classes::Files::new(),
    };
    for DropIn { place, text } in dropin::all(Daemon::Crio, Format::Crio, &wanted) {
        let found = files::read_text(&run.layout.host.at(&*place.path))?;
        if let Some(text) = text.filter(|text| !place.of_cri && found.as_ref() == Some(text)) {
            let path = PathBuf::from(&*place.path);
            state.written.insert(path, files::sha256(text.as_bytes()));
        }
    }
    for (path, text) in classes::found(&run.layout.host)? {
        state.written.insert(path, files::sha256(text.as_bytes()));
        state.made.push(classes::FOLDER.into());
    }
    state.made.dedup();
    Ok(state)
}

/// Our files that a CRI reads, whichever it is.
fn present(run: &Run) -> Result<Vec<Place>> {
    let mut present = Vec::new();
    for daemon in Daemon::all() {
        for place in dropin::places(daemon) {
            let text = files::read_text(&run.layout.host.at(&*place.path))?;
            if place.of_cri && text.is_some_and(|text| text.starts_with(MARK)) {
                present.push(place);
            }
        }
    }
    Ok(present)
}

fn refuse_in_use(run: &mut Run, cri: Option<&Cri>, handlers: &BTreeSet<String>) -> Result<()> {
    if let Some(cri) = cri {
        run.report.handler_seen = still_listed(cri, handlers)?.map(|listed| !listed.is_empty());
        let ready = cri.ready_sandboxes(handlers)?;
        if let Some(first) = ready.first() {
            return Err(InstallError::SandboxesExist {
                count: ready.len(),
                example: first.pod.clone(),
                handler: first.handler.clone(),
            });
        }
    }
    // A shim ends a moment after its pod; tasks without a pod, which the CRI does not know, stay.
    let end = Instant::now() + SHIM_END;
    while let Some(version) = versions::in_use(&run.layout)? {
        if Instant::now() >= end {
            return Err(InstallError::InUse { version });
        }
        thread::sleep(PACE);
    }
    Ok(())
}

/// Those of our handlers that the CRI serves; none where it does not tell.
fn still_listed(cri: &Cri, ours: &BTreeSet<String>) -> Result<Option<BTreeSet<String>>> {
    Ok(cri.handlers()?.map(|served| served.among(ours)))
}

/// Takes the handlers away from the CRI. From here on only forward: a node without them is what was asked for.
fn disconnect(
    run: &mut Run,
    cri: &Cri,
    of_cri: &[Place],
    handlers: &BTreeSet<String>,
    state: &mut State,
) -> Result<()> {
    let left = state.pending.take().unwrap_or_default();
    state.pending = Some(Pending {
        boot_id: run.boot_id(),
        restart: true,
        ..left
    });
    run.layout.save(state)?;
    for place in of_cri {
        step(format_args!("removing {}", place.path));
        files::remove(&run.layout.host.at(&*place.path))?;
    }
    take_lines_out(run, state)?;
    step(format_args!("restarting {}", cri.daemon.name()));
    run.report.restarted = true;
    restart(cri, run.options.restart.as_deref())?;
    step(format_args!("asking {} for the handler {HANDLER}", cri.daemon.name()));
    let listed = still_listed(cri, handlers)?;
    run.report.handler_seen = listed.as_ref().map(|listed| !listed.is_empty());
    if let Some(handler) = listed.and_then(|listed| listed.into_iter().next()) {
        let cri = cri.daemon.name();
        return Err(InstallError::HandlerPresent { cri, handler });
    }
    state.pending = None;
    run.layout.save(state)
}

/// Puts back the files that have a line of ours; from one that was edited since, only the line goes. That it reads a
/// folder where nothing of ours is needs no restart.
fn take_lines_out(run: &mut Run, state: &mut State) -> Result<()> {
    if state.edited.is_empty() {
        return Ok(());
    }
    for (path, edit) in state.edited.clone() {
        let places = Daemon::all().map(|daemon| daemon.site().main_place());
        let Some(place) = places.iter().find(|place| Path::new(&*place.path) == path) else {
            continue;
        };
        let (file, scratch) = (run.layout.host.at(&path), run.layout.host.at(place.scratch));
        let Some(text) = files::read_text(&file)? else {
            continue;
        };
        let unedited = files::sha256(text.as_bytes()) == edit.sha256;
        let had_list = edit.before.as_deref().is_some_and(imports::has_list);
        let without = match unedited {
            true => edit.before,
            false => match imports::removed(&text, &edit.pattern, !had_list) {
                None => continue,
                edited => edited,
            },
        };
        step(format_args!("taking the import out of {}", path.display()));
        match without {
            Some(text) => files::replace(&file, text.as_bytes(), &scratch, imports::mode(&file)?)?,
            None => drop(files::remove(&file)?),
        }
        if !unedited {
            run.warn(Some(format!(
                "{} was edited since its import was added: only that was taken out",
                path.display()
            )));
        }
    }
    state.edited.clear();
    run.layout.save(state)
}

/// Removes the files that we wrote among the administrator's, unless he has edited them.
fn remove_written(run: &mut Run, state: &State) -> Result<()> {
    for (path, sha256) in &state.written {
        let place = run.layout.host.at(path);
        match files::read(&place)? {
            Some(bytes) if files::sha256(&bytes) == *sha256 => {
                step(format_args!("removing {}", path.display()));
                files::remove(&place)?;
            }
            Some(_) => run.warn(Some(format!("{} was edited; it stays", path.display()))),
            None => {}
        }
    }
    Ok(())
}

/// Takes away everything below the prefix, and the folders that were made. The CRI's files are gone already.
///
/// # Errors
/// The kernel's.
pub fn clear(run: &mut Run, state: &State) -> Result<()> {
    let layout = run.layout.clone();
    versions::make_current(&layout, None)?;
    for name in versions::all(&layout)? {
        let warning = versions::remove(&layout, &name)?;
        run.warn(warning);
    }
    versions::sweep(&layout, &[])?;
    files::remove_empty(&layout.versions())?;
    for scratch in ["current", "state.json"] {
        files::remove(&files::scratch_name(&layout.root().join(scratch), &layout.root()))?;
    }
    let elsewhere = state.made.iter().rev().filter(|made| !layout.prefix.starts_with(made));
    for folder in elsewhere {
        files::remove_empty(&layout.host.at(folder))?;
    }
    layout.forget(state)
}
