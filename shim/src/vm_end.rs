//! The end of a VM that nobody asked for, and whose end it was: QEMU's or virtiofsd's.

use std::{fmt, time::Duration};

use tokio::time::timeout;
use vmm::{ExitReason, Virtiofsd, Vm};

/// How long QEMU may take to be known as ended after its connections to the agent and to virtiofsd have closed.
pub const HANG_UP: Duration = Duration::from_secs(1);

/// Which process ended the VM.
#[derive(Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// QEMU, and how.
    Qemu(ExitReason),
    /// virtiofsd, and how, while QEMU ran on.
    Virtiofsd(ExitReason),
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qemu(reason) => write!(f, "QEMU {reason}"),
            Self::Virtiofsd(reason) => write!(f, "virtiofsd {reason}"),
        }
    }
}

/// Waits until QEMU or virtiofsd has ended.
pub async fn vm_end(vm: &Vm, virtiofsd: &Virtiofsd) -> VmEnd {
    first(vm.child().exited(), virtiofsd.child().exited()).await
}

/// virtiofsd ends well when QEMU has, and may be seen first: QEMU's end is the one to be told then.
async fn first(qemu: impl Future<Output = ExitReason>, virtiofsd: impl Future<Output = ExitReason>) -> VmEnd {
    tokio::pin!(qemu);
    let reason = tokio::select! {
        biased;
        reason = &mut qemu => return VmEnd::Qemu(reason),
        reason = virtiofsd => reason,
    };
    match reason {
        ExitReason::Code(0) => timeout(HANG_UP, qemu)
            .await
            .map_or(VmEnd::Virtiofsd(reason), VmEnd::Qemu),
        _ => VmEnd::Virtiofsd(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::task::yield_now;

    use super::*;

    const KILLED: ExitReason = ExitReason::Signal(9);

    #[tokio::test]
    async fn qemus_end_is_told_though_virtiofsds_is_seen_first() {
        let qemu = async {
            yield_now().await;
            KILLED
        };
        let end = first(qemu, ready(ExitReason::Code(0))).await;
        assert_eq!(end.to_string(), "QEMU was killed by signal 9");
    }

    #[tokio::test]
    async fn a_virtiofsd_that_failed_is_told_at_once() {
        for reason in [KILLED, ExitReason::Code(1)] {
            assert_eq!(first(pending(), ready(reason)).await, VmEnd::Virtiofsd(reason));
        }
    }

    #[tokio::test]
    async fn a_virtiofsd_that_leaves_its_qemu_alone_is_told() {
        let end = first(pending(), ready(ExitReason::Code(0))).await;
        assert_eq!(end, VmEnd::Virtiofsd(ExitReason::Code(0)));
    }
}
