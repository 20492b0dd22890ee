//! Puts Sandpod on a node, looks after it, and takes it away again; without Kubernetes.
//!
//! A version is a folder of its own below the prefix, and `current` a link to one of them; the CRI's drop-in names
//! paths through that link only. So an upgrade moves the link, and the CRI is restarted for the first install alone.
//! Every step can be repeated after a death at any point: see [`state`].

pub mod classes;
pub mod cri;
pub mod crio;
pub mod daemon;
pub mod dropin;
pub mod dry_run;
pub mod effective;
pub mod elf;
pub mod error;
pub mod files;
pub mod imports;
pub mod kubelet;
pub mod lock;
pub mod merged;
pub mod payload;
pub mod preflight;
pub mod restart;
pub mod runtime_folder;
pub mod selinux;
pub mod served;
pub mod state;
pub mod versions;

mod sys;
mod verb_install;
mod verb_uninstall;
mod verb_verify;

pub use installer_report::{self as report, handler, log_level};

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    path::{Path, PathBuf},
};

use config::Config;
use node_check::{Finding, text};

use self::{
    cri::{Cri, HANDLER},
    daemon::{Daemon, Kind},
    error::{Context, InstallError, Result},
    files::Host,
    lock::NodeLock,
    payload::Payload,
    state::Layout,
};
use crate::{
    log_level::LogLevel,
    report::{Accelerator, Phase, Report, Verb},
};

/// What the installer is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to do.
    pub verb: Verb,
    /// The folder of the payload; only an install needs one.
    pub payload: Option<PathBuf>,
    /// Where the node's root folder is.
    pub host_root: PathBuf,
    /// Where on the node it is installed.
    pub prefix: PathBuf,
    /// How much is logged.
    pub log_level: LogLevel,
    /// TOML that is laid over the installed configuration of pods, before the node's own files; or empty.
    pub configuration: String,
    /// RuntimeClasses with settings of their own, by name: TOML that is laid over all other settings; or empty.
    pub runtime_classes: BTreeMap<String, String>,
    /// The CRI, if it is not to be found out.
    pub cri: Option<Kind>,
    /// Whether a line may be added to containerd's main file, if it does not read the drop-ins.
    pub add_imports: bool,
    /// The command that restarts the CRI, if it is not systemd.
    pub restart: Option<Vec<String>>,
    /// The node's boot (`/proc/sys/kernel/random/boot_id`), if the run is for that one alone.
    pub boot_id: Option<String>,
}

/// Does what it is asked for, and says what became of it.
#[must_use]
pub fn run(options: &Options) -> Report {
    let mut report = Report::new(options.verb);
    let begun = Run::begin(options, &mut report);
    let (outcome, touched) = match begun {
        Ok(mut run) => {
            let outcome = match options.verb {
                Verb::Install => verb_install::install(&mut run),
                Verb::Verify => verb_verify::verify(&mut run),
                Verb::Uninstall => verb_uninstall::uninstall(&mut run),
            };
            run.report.version = run.layout.current_version().unwrap_or_default();
            (outcome, run.touched)
        }
        Err(error) => (Err(error), false),
    };
    match outcome {
        Ok(phase) => report.phase = phase,
        Err(error) => {
            let looked = options.verb == Verb::Verify;
            report.phase = if touched || looked {
                Phase::Failed
            } else {
                Phase::Refused
            };
            // What an install has changed it has put back; an uninstall goes only forward.
            let put_back = options.verb == Verb::Install && !matches!(error, InstallError::NotUndone { .. });
            report.changed = touched && !put_back;
            report.error = Some(error.problem());
        }
    }
    report
}

/// Says which step comes now. Tests end the installer at each of these lines.
fn step(what: impl Display) {
    eprintln!("installer: {what}");
}

/// One run on one node.
struct Run<'r> {
    options: &'r Options,
    layout: Layout,
    payload: Option<Payload>,
    findings: Vec<Finding>,
    report: &'r mut Report,
    /// Something that was there before is not as it was.
    touched: bool,
}

impl<'r> Run<'r> {
    /// Opens the payload, looks at the kernel and the devices, and takes the node's root for this process's own: from
    /// then on a link of the node leads where it leads on the node.
    fn begin(options: &'r Options, report: &'r mut Report) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err(InstallError::Usage("the installer has to be run as root"));
        }
        if !options.prefix.is_absolute() || !files::is_inside(options.prefix.strip_prefix("/").unwrap_or(Path::new("")))
        {
            return Err(InstallError::Usage(
                "--prefix has to be an absolute path below /, without `..`",
            ));
        }
        let payload = match (options.verb, &options.payload) {
            (Verb::Install, None) => return Err(InstallError::Usage("an install needs --payload")),
            (Verb::Install, Some(folder)) => Some(Payload::open(folder)?),
            _ => None,
        };
        report.facts.boot_id = text("/proc/sys/kernel/random/boot_id");
        report.facts.kernel = text("/proc/sys/kernel/osrelease");
        if let Some(asked) = options.boot_id.clone().filter(|asked| *asked != report.facts.boot_id) {
            let now = report.facts.boot_id.clone();
            return Err(InstallError::OtherBoot { now, asked });
        }
        let defaults = Config::parse("", &[]).map_err(|error| InstallError::Payload(error.to_string()))?;
        let findings = node_check::node(&options.host_root, &defaults);
        if options.host_root != Path::new("/") {
            nix::unistd::chroot(&options.host_root).at("enter", &options.host_root)?;
            nix::unistd::chdir("/").at("enter", &options.host_root)?;
        }
        let host = Host::new("/");
        report.facts.selinux = selinux::Mode::of(&host) != selinux::Mode::Off;
        Ok(Self {
            options,
            layout: Layout {
                host,
                prefix: options.prefix.clone(),
            },
            payload,
            findings,
            report,
            touched: false,
        })
    }

    /// The node's CRI: the one that its kubelet uses, else the one that the last install was for, else the one that
    /// answers; of the kind that was asked for in any case.
    fn cri(&mut self, last: Option<Daemon>) -> Result<Cri> {
        let cri = Cri::find(&self.layout.host, self.options.cri, last)?;
        self.report.facts.cri = cri.describe();
        Ok(cri)
    }

    /// Whether pods can run with the node's configuration, which is `base` where the administrator has none of his own;
    /// with `new` in the place of the KataConfig's, if there is one to be put there. Returns that configuration.
    fn judge(&mut self, kind: Kind, base: Option<&str>, new: Option<&str>) -> Result<Config> {
        let config = preflight::configuration(&self.layout, kind, base, new)?;
        self.report.facts.accelerator = match config.hypervisor.accelerator {
            config::Accelerator::Kvm => Accelerator::Kvm,
            config::Accelerator::Tcg => Accelerator::Tcg,
        };
        let warnings = preflight::judge(&self.findings, self.report.facts.accelerator)?;
        self.report.warnings.extend(warnings);
        Ok(config)
    }

    /// The handlers that our drop-ins on the node define, whichever CRI reads them; `kata` in any case.
    fn handlers(&self) -> Result<BTreeSet<String>> {
        let mut handlers = BTreeSet::from([HANDLER.to_owned()]);
        for daemon in Daemon::all() {
            for place in dropin::places(daemon).into_iter().filter(|place| place.of_cri) {
                let text = files::read_text(&self.layout.host.at(&*place.path))?.unwrap_or_default();
                handlers.extend(dropin::handlers_of(daemon.kind(), &text));
            }
        }
        Ok(handlers)
    }

    /// Removes what a run that was killed had not yet moved to its place, or had moved away already. Whether there was
    /// any.
    fn sweep_scratch(&self, lock: &NodeLock) -> Result<bool> {
        let host = &self.layout.host;
        let mut swept = self.layout.sweep_beside()? | lock.folder.sweep()? | classes::sweep(host)?;
        for daemon in Daemon::all() {
            for place in dropin::places(daemon).into_iter().chain([daemon.site().main_place()]) {
                swept |= files::remove(&files::scratch_name(Path::new(&*place.path), &host.at(place.scratch)))?;
            }
        }
        Ok(swept)
    }

    /// Refuses a node whose handler is ours and goes through another prefix.
    fn refuse_other_prefix(&self) -> Result<()> {
        let places = Daemon::all().into_iter().flat_map(dropin::places);
        for place in places.filter(|place| place.of_cri) {
            let text = files::read_text(&self.layout.host.at(&*place.path))?.unwrap_or_default();
            if let Some(prefix) = dropin::prefix_of(&text).filter(|prefix| *prefix != self.layout.prefix) {
                return Err(InstallError::OtherPrefix { prefix });
            }
        }
        Ok(())
    }

    fn boot_id(&self) -> String {
        self.report.facts.boot_id.clone()
    }

    fn warn(&mut self, warning: Option<String>) {
        self.report.warnings.extend(warning);
    }
}
