//! Whether this node can run our pods, and if not, what is missing and what to do about it.

use std::path::Path;

use config::Config;
use node_check::{Finding, Verdict};

use crate::cgroup::{self, SandboxCgroup};

/// Looks at everything that this configuration needs. Changes nothing.
pub fn check(config: &Config) -> Vec<Finding> {
    let mut findings = node_check::node(Path::new("/"), config);
    findings.extend(node_check::programs(config));
    findings.push(cgroups());
    findings
}

fn cgroups() -> Finding {
    let (verdict, detail) = match SandboxCgroup::plan("/sandpod-check") {
        Ok(_) if cgroup::is_v2() => (Verdict::Ok, "version 2".to_owned()),
        Ok(_) => (Verdict::Ok, "version 1".to_owned()),
        Err(error) => (Verdict::Missing, error.to_string()),
    };
    Finding {
        part: "cgroups",
        verdict,
        detail,
    }
}
