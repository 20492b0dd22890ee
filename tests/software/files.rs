//! What files that virtiofsd serves cannot do, as the documentation says.

use tests::{
    config::Runtime,
    cri::{Access, Pod},
    failure::{Result, claim, same},
    node::Node,
};

use crate::{Story, host_path, software};

pub const OF_A_VM: &[Story] = &[(
    "files_of_the_host_have_their_limits",
    files_of_the_host_have_their_limits,
)];

/// Each as a number of errno(3), or 0; the last is that of a file that is made where there is one.
const ASK: &str = "perl -MErrno -e 'sub say { print $_[0] ? 0 : $!+0, qq(\\n) } \
    sysopen(F, qq(/data/file), 0102); $flags = pack(qq(L), 0); say(ioctl(F, 0x80086601, $flags)); \
    say(sysopen(T, qq(/data), 0x410002)); say(sysopen(G, qq(/data/file), 0302))'";

/// No flags of files (`lsattr`), no files without a name (`O_TMPFILE`), and no locks between pods; a lock that is a
/// file holds.
fn files_of_the_host_have_their_limits(node: &Node, runtime: Runtime) -> Result {
    let data = host_path(node, "limits")?;
    let pods = [node.pod(runtime, "holder")?.run()?, node.pod(runtime, "asker")?.run()?];
    let container = |pod| {
        let container = software(pod, "one", "exec sleep infinity")?;
        container.volume(&data, "/data", Access::ReadWrite).run()
    };
    let (holder, asker) = (container(&pods[0])?, container(&pods[1])?);
    holder.shell("flock -x /data/lock sleep 1000 >/dev/null 2>&1 & while flock -n /data/lock true; do :; done")?;
    same(
        "a lock of another pod's",
        asker.shell("flock -n /data/lock echo taken")?.trim(),
        "taken",
    )?;
    let said = asker.shell(ASK)?;
    let said: Vec<i32> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let (unsupported, not_a_terminal, exists) = (95, 25, 17);
    claim(
        matches!(said[..], [flags, nameless, taken]
            if [unsupported, not_a_terminal].contains(&flags) && nameless == unsupported && taken == exists),
        format!("flags, a file without a name and one that is there: errors {said:?}"),
    )?;
    pods.into_iter().try_for_each(Pod::remove)
}
