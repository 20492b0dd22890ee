//! What the installer says about a node: the JSON that its pod leaves as termination message. And the words in which
//! the controller asks it.

pub mod handler;
pub mod log_level;

use serde::{Deserialize, Serialize};

/// Where the packages, and the payload's own files, expect the installation.
pub const DEFAULT_PREFIX: &str = "/opt/sandpod";
/// The longest termination message that a kubelet keeps, in bytes (Kubernetes, `terminationMessagePath`).
pub const MAX_BYTES: usize = 4096;

/// What became of one run of the installer on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What was asked for.
    pub verb: Verb,
    /// How it ended.
    pub phase: Phase,
    /// The version that is current on the node now, as `<version>-<first 8 digits of its payload's hash>`; empty when
    /// there is none.
    #[serde(default)]
    pub version: String,
    /// Something on the node is not as it was before.
    #[serde(default)]
    pub changed: bool,
    /// The CRI was restarted.
    #[serde(default)]
    pub restarted: bool,
    /// Whether the running CRI had our handlers when it was asked last: containerd lists them from 2.0 on, CRI-O from
    /// 1.30 on, and an earlier CRI-O tells its configuration. None when it was not asked, or does not tell.
    #[serde(default)]
    pub handler_seen: Option<bool>,
    /// Why the phase is [`Phase::Refused`] or [`Phase::Failed`]; otherwise none.
    #[serde(default)]
    pub error: Option<Problem>,
    /// Sentences that an administrator should read although all went well.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What the node is.
    #[serde(default)]
    pub facts: Facts,
}

/// What an installer can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Put the payload's version on the node and make it the current one.
    Install,
    /// Look whether the node is as the last install left it. Changes nothing.
    Verify,
    /// Take everything away again.
    Uninstall,
}

impl Verb {
    /// The word on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Install => "install",
            Self::Verify => "verify",
            Self::Uninstall => "uninstall",
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The version is current and the CRI lists the handler.
    Installed,
    /// Nothing is missing.
    Verified,
    /// Nothing of ours is left.
    Uninstalled,
    /// The node is not fit, or is in use; nothing was changed.
    Refused,
    /// Something went wrong on the way; what had been changed was put back as far as the error's text does not say
    /// otherwise.
    Failed,
}

/// Why a run did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// For programs.
    pub code: Code,
    /// For people: one sentence that names what is wrong and what to do.
    pub text: String,
}

/// Kinds of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Code {
    /// /dev/kvm is absent or cannot do what QEMU needs.
    NoKvm,
    /// Another part of the node is not fit for pods, such as its kernel.
    NotFit,
    /// Neither CRI-O nor containerd is there, or it does not answer.
    NoCri,
    /// The CRI is older than the oldest that works.
    CriTooOld,
    /// Somebody else's configuration has a handler of our name.
    ForeignHandler,
    /// Our file exists with contents that we did not write.
    ForeignFile,
    /// It is installed below another prefix.
    OtherPrefix,
    /// containerd does not read the folder of its drop-ins.
    DropInNotRead,
    /// The CRI's merged configuration would be invalid.
    ConfigInvalid,
    /// The prefix cannot be written.
    ReadOnlyPrefix,
    /// Others than root could change what is installed below the prefix.
    UnsafePrefix,
    /// Too little space.
    DiskFull,
    /// The host's SELinux refuses the labels that our files need.
    SeLinux,
    /// The payload is incomplete or damaged.
    Payload,
    /// Another installer is at work on this node.
    Busy,
    /// The CRI did not come back after its restart.
    RestartFailed,
    /// The CRI is up and does not list our handler.
    HandlerAbsent,
    /// The CRI still has sandboxes of our handler.
    SandboxesExist,
    /// The node is not in the boot for which the run was made.
    OtherBoot,
    /// There is nothing to verify.
    NotInstalled,
    /// What is installed is not what was installed.
    Damaged,
    /// The command line is wrong.
    Usage,
    /// The kernel refused an operation.
    Io,
    /// A kind that this version does not know.
    #[serde(other)]
    Other,
}

impl Code {
    /// Whether kata does not work on a node of which an installer says this. The other kinds are about the run alone:
    /// they say nothing of what an earlier run has seen to work.
    #[must_use]
    pub fn is_about_the_node(self) -> bool {
        match self {
            Self::NoKvm
            | Self::NotFit
            | Self::CriTooOld
            | Self::ForeignHandler
            | Self::ForeignFile
            | Self::OtherPrefix
            | Self::DropInNotRead
            | Self::ConfigInvalid
            | Self::SeLinux
            | Self::RestartFailed
            | Self::HandlerAbsent
            | Self::NotInstalled
            | Self::Damaged => true,
            Self::NoCri
            | Self::ReadOnlyPrefix
            | Self::UnsafePrefix
            | Self::DiskFull
            | Self::Payload
            | Self::Busy
            | Self::SandboxesExist
            | Self::OtherBoot
            | Self::Usage
            | Self::Io
            | Self::Other => false,
        }
    }
}

/// What the node is. What could not be found out is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Facts {
    /// Name and version, such as `containerd 2.4.2`.
    pub cri: String,
    /// The kernel's random identifier of this boot.
    pub boot_id: String,
    /// The kernel's release.
    pub kernel: String,
    /// What guests run with.
    pub accelerator: Accelerator,
    /// SELinux is enabled.
    pub selinux: bool,
}

/// What guests run with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualization.
    #[default]
    Kvm,
    /// Emulation, because the node's administrator says so.
    Tcg,
}

/// Why a termination message is no report.
#[derive(Debug, thiserror::Error)]
#[error("the installer left no report: {0}")]
pub struct ReportError(#[from] serde_json::Error);

impl Report {
    /// A report of a run that has just begun.
    #[must_use]
    pub fn new(verb: Verb) -> Self {
        Self {
            verb,
            phase: Phase::Failed,
            version: String::new(),
            changed: false,
            restarted: false,
            handler_seen: None,
            error: None,
            warnings: Vec::new(),
            facts: Facts::default(),
        }
    }

    /// Reads a termination message.
    ///
    /// # Errors
    /// Text that is not the JSON of a report, such as an empty one or one that was cut off.
    pub fn parse(text: &str) -> Result<Self, ReportError> {
        Ok(serde_json::from_str(text)?)
    }

    /// The report as one line of JSON of at most [`MAX_BYTES`]: warnings are left out from the last to the first, then
    /// the error's text is cut.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut report = self.clone();
        loop {
            let text = serde_json::json!(report).to_string();
            let Some(excess) = text.len().checked_sub(MAX_BYTES).filter(|excess| *excess > 0) else {
                return text;
            };
            if report.warnings.pop().is_some() {
                continue;
            }
            match &mut report.error {
                Some(problem) if !problem.text.is_empty() => cut(&mut problem.text, excess),
                // Nothing of what is left is that long on a real node.
                _ => {
                    report.facts = Facts::default();
                    report.version.clear();
                }
            }
        }
    }
}

/// Shortens a text by at least this many bytes, at a character, and shows that by an ellipsis where there is room for
/// one.
fn cut(text: &mut String, excess: usize) {
    const ELLIPSIS: &str = "...";
    let mut end = text.len().saturating_sub(excess + ELLIPSIS.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    if end > 0 {
        text.push_str(ELLIPSIS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Report {
        Report {
            phase: Phase::Refused,
            version: "0.1.0-1a2b3c4d".into(),
            handler_seen: Some(true),
            error: Some(Problem {
                code: Code::NoKvm,
                text: "/dev/kvm is absent".into(),
            }),
            warnings: vec!["slow".into()],
            facts: Facts {
                cri: "containerd 2.4.2".into(),
                boot_id: "b".into(),
                kernel: "6.12".into(),
                accelerator: Accelerator::Tcg,
                selinux: false,
            },
            ..Report::new(Verb::Install)
        }
    }

    #[test]
    fn the_json_has_the_names_that_were_agreed() {
        let json = concat!(
            r#"{"changed":false,"error":{"code":"NoKvm","text":"/dev/kvm is absent"},"#,
            r#""facts":{"accelerator":"tcg","bootId":"b","cri":"containerd 2.4.2","kernel":"6.12","selinux":false},"#,
            r#""handlerSeen":true,"phase":"refused","restarted":false,"verb":"install","version":"0.1.0-1a2b3c4d","#,
            r#""warnings":["slow"]}"#
        );
        assert_eq!(full().to_json(), json);
        assert_eq!(Report::parse(json).unwrap(), full());
    }

    #[test]
    fn a_report_of_another_version_is_understood() {
        let later = r#"{"verb":"verify","phase":"failed","error":{"code":"TooHot","text":"no"},"news":1}"#;
        let report = Report::parse(later).unwrap();
        assert_eq!(report.error.map(|problem| problem.code), Some(Code::Other));
        assert!(Report::parse("").is_err());
    }

    #[test]
    fn a_report_fits_a_termination_message() {
        let mut report = full();
        report.warnings = vec!["w".repeat(3000), "w".repeat(3000)];
        let kept = Report::parse(&report.to_json()).unwrap();
        assert_eq!(kept.warnings.len(), 1);
        report.error = Some(Problem {
            code: Code::Io,
            text: "\"ä".repeat(3000),
        });
        let json = report.to_json();
        assert!(json.len() <= MAX_BYTES);
        let kept = Report::parse(&json).unwrap();
        assert!(kept.warnings.is_empty());
        assert!(kept.error.unwrap().text.ends_with("..."), "{json}");
    }
}
