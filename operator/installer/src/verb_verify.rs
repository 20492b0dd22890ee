//! `verify`: whether the node is as the last install left it.

use std::{collections::BTreeSet, path::PathBuf};

use config::Config;

use super::{
    Run, classes, dropin,
    error::{InstallError, Result},
    files,
    lock::NodeLock,
    merged, step, versions,
};
use crate::report::Phase;

/// Looks at the version's files, the drop-in and the running CRI. Changes nothing.
///
/// # Errors
/// The first thing that is not as it should be.
pub fn verify(run: &mut Run) -> Result<Phase> {
    let _lock = NodeLock::take(&run.layout.host)?;
    step("looking at what is installed");
    let prefix = run.layout.prefix.clone();
    let absent = || InstallError::NotInstalled { prefix: prefix.clone() };
    let state = run.layout.load()?.ok_or_else(absent)?;
    let version = run.layout.current_version().ok_or_else(absent)?;
    if state.pending.is_some() {
        return Err(InstallError::Damaged {
            path: prefix.join("state.json"),
            how: "tells of an install that was cut off",
        });
    }
    versions::inspect(&run.layout, &version)?;
    let cri = run.cri(state.cri)?;
    let format = merged::format(&run.layout.host, cri.daemon)?;
    let classes: BTreeSet<String> = state.written.keys().filter_map(|path| classes::name_of(path)).collect();
    let handler = dropin::handler(cri.daemon, format, &prefix, &classes);
    let found = files::read_text(&run.layout.host.at(&*handler.place.path))?;
    if found != handler.text {
        let version = |text: &Option<String>| text.as_deref().and_then(dropin::version_of);
        let misread = version(&found).is_some_and(|found| Some(found) != version(&handler.text));
        return Err(InstallError::Damaged {
            path: PathBuf::from(&*handler.place.path),
            how: match misread {
                true => "has not the `version` of the configuration that imports it",
                false => "is not what was installed",
            },
        });
    }
    let base = files::read_text(&run.layout.current().join("configuration.toml"))?;
    run.judge(cri.daemon.kind(), base.as_deref(), None)?;
    for name in &classes {
        let path = run.layout.host.at(&*classes::place(name).path);
        classes::refuse_invalid(name, Config::load(Some(&path)))?;
    }
    step(format_args!(
        "asking {} for the handler {}",
        cri.daemon.name(),
        super::cri::HANDLER
    ));
    let handlers = classes::handlers(classes.iter());
    let Some(served) = cri.handlers()? else {
        return Ok(Phase::Verified);
    };
    let proof = served.prove(cri.daemon.name(), &handlers, &found.unwrap_or_default());
    run.report.handler_seen = Some(proof.is_ok());
    proof.map(|()| Phase::Verified)
}
