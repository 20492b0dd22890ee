//! The user and group IDs of a pod with a user namespace (`hostUsers: false`), as they go from the specification to the
//! guest.

use std::fmt::{self, Write};

use oci_spec::runtime::{Linux, LinuxIdMapping};

/// The kernel parameters that tell our agent: `sandpod.uid_map=<container>:<guest>:<size>[,…]`. An agent that does not
/// know them makes each container's namespace from its specification.
const PARAMETERS: [&str; 2] = ["sandpod.uid_map", "sandpod.gid_map"];
/// The most ranges that a kernel takes of one kind (`UID_GID_MAP_MAX_EXTENTS` of `include/linux/user_namespace.h` of
/// Linux).
const MOST_RANGES: usize = 340;

/// The last ID: the one above means "none".
const SERVER: u32 = u32::MAX - 1;

/// A range of IDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first in the container.
    pub inner: u32,
    /// The first outside of it: in the guest, and of its files on the host.
    pub outer: u32,
    /// How many there are.
    pub size: u32,
}

/// What the IDs of a pod's containers are outside of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    /// User IDs.
    pub users: Vec<Range>,
    /// Group IDs.
    pub groups: Vec<Range>,
}

/// Mappings that no kernel takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} are no ID mappings: from 1 to 340 ranges `<container>:<guest>:<size>` that do not overlap")]
pub struct BadMaps(String);

impl IdMaps {
    /// The mappings of a specification; `None` if it has none.
    ///
    /// # Errors
    /// Users without groups or the other way round, and ranges that contradict each other.
    pub fn of(linux: &Linux) -> Result<Option<IdMaps>, BadMaps> {
        let ranges = |mappings: &Option<Vec<LinuxIdMapping>>| -> Vec<Range> {
            mappings.iter().flatten().map(Range::of).collect()
        };
        IdMaps {
            users: ranges(linux.uid_mappings()),
            groups: ranges(linux.gid_mappings()),
        }
        .checked()
    }

    /// The mappings of a mount; as [`IdMaps::of`].
    ///
    /// # Errors
    /// As there.
    pub fn of_mount(mount: &oci_spec::runtime::Mount) -> Result<Option<IdMaps>, BadMaps> {
        let mut linux = Linux::default();
        linux
            .set_uid_mappings(mount.uid_mappings().clone())
            .set_gid_mappings(mount.gid_mappings().clone());
        IdMaps::of(&linux)
    }

    /// Reads one text for each kind, as in [`IdMaps::kernel_parameters`] and in the options of containerd's snapshots.
    ///
    /// # Errors
    /// A text that is none.
    pub fn parse(users: &str, groups: &str) -> Result<IdMaps, BadMaps> {
        let maps = IdMaps {
            users: parse(users)?,
            groups: parse(groups)?,
        };
        maps.checked()?.ok_or_else(|| BadMaps(format!("{users} {groups}")))
    }

    /// Finds them on a kernel's command line.
    ///
    /// # Errors
    /// One of two, or a text that is none.
    pub fn from_command_line(line: &str) -> Result<Option<IdMaps>, BadMaps> {
        let find = |name: &str| {
            let mut words = line.split_whitespace().filter_map(|word| word.split_once('='));
            words.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        match PARAMETERS.map(find) {
            [None, None] => Ok(None),
            [users, groups] => IdMaps::parse(users.unwrap_or_default(), groups.unwrap_or_default()).map(Some),
        }
    }

    /// What [`IdMaps::from_command_line`] finds.
    pub fn kernel_parameters(&self) -> [String; 2] {
        let [users, groups] = PARAMETERS;
        [
            format!("{users}={}", written(&self.users, ':', ",")),
            format!("{groups}={}", written(&self.groups, ':', ",")),
        ]
    }

    /// The contents of `uid_map` and `gid_map` of `/proc/<pid>` (user_namespaces(7)).
    pub fn files(&self) -> [(&'static str, String); 2] {
        [
            ("uid_map", written(&self.users, ' ', "\n")),
            ("gid_map", written(&self.groups, ' ', "\n")),
        ]
    }

    /// These mappings for mounts of files that root serves: with a number on disk for root itself, the last one that a
    /// file may have. It stands for nobody, but without any root could neither rename nor link on such a mount, not
    /// even the files of others (`may_create` in `fs/namei.c` of Linux).
    #[must_use]
    pub fn with_server(mut self) -> IdMaps {
        for ranges in [&mut self.users, &mut self.groups] {
            let apart = |range: &Range| range.outer > 0 && SERVER - range.inner >= range.size;
            if ranges.len() < MOST_RANGES && ranges.iter().all(apart) {
                ranges.push(Range {
                    inner: SERVER,
                    outer: 0,
                    size: 1,
                });
            }
        }
        self
    }

    /// A container's user outside of it; `None` when it has no number there.
    pub fn user(&self, inner: u32) -> Option<u32> {
        outer(&self.users, inner)
    }

    /// A container's group outside of it.
    pub fn group(&self, inner: u32) -> Option<u32> {
        outer(&self.groups, inner)
    }

    fn checked(self) -> Result<Option<IdMaps>, BadMaps> {
        if self.users.is_empty() && self.groups.is_empty() {
            return Ok(None);
        }
        if is_map(&self.users) && is_map(&self.groups) {
            return Ok(Some(self));
        }
        Err(BadMaps(self.to_string()))
    }
}

impl fmt::Display for IdMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (users, groups) = (written(&self.users, ':', ","), written(&self.groups, ':', ","));
        write!(f, "users {users} groups {groups}")
    }
}

impl Range {
    fn of(mapping: &LinuxIdMapping) -> Range {
        Range {
            inner: mapping.container_id(),
            outer: mapping.host_id(),
            size: mapping.size(),
        }
    }
}

fn outer(ranges: &[Range], inner: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inner.checked_sub(range.inner)?;
        (offset < range.size).then(|| range.outer + offset)
    })
}

/// Whether a kernel takes these ranges: none empty, none beyond the last ID, no two that overlap on either side.
fn is_map(ranges: &[Range]) -> bool {
    let ends = |first: u32, size: u32| first.checked_add(size).is_some();
    let apart = |one: u32, other: u32, sizes: (u32, u32)| one + sizes.0 <= other || other + sizes.1 <= one;
    let alone = |(index, range): (usize, &Range)| {
        let sizes = |other: &Range| (range.size, other.size);
        ranges[..index]
            .iter()
            .all(|other| apart(range.inner, other.inner, sizes(other)) && apart(range.outer, other.outer, sizes(other)))
    };
    let whole = |range: &Range| range.size > 0 && ends(range.inner, range.size) && ends(range.outer, range.size);
    (1..=MOST_RANGES).contains(&ranges.len()) && ranges.iter().all(whole) && ranges.iter().enumerate().all(alone)
}

fn parse(text: &str) -> Result<Vec<Range>, BadMaps> {
    let range = |part: &str| {
        let mut numbers = part.split(':').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        let range = Range {
            inner: next()?,
            outer: next()?,
            size: next()?,
        };
        numbers.next().is_none().then_some(range)
    };
    let ranges: Option<Vec<Range>> = text.split(',').map(range).collect();
    ranges.ok_or_else(|| BadMaps(text.to_owned()))
}

fn written(ranges: &[Range], between: char, after: &str) -> String {
    let mut text = String::new();
    for range in ranges {
        let after = if text.is_empty() { "" } else { after };
        // A string takes everything.
        let _ = write!(
            text,
            "{after}{}{between}{}{between}{}",
            range.inner, range.outer, range.size
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_go_through_the_kernels_command_line() {
        let maps = IdMaps::parse("0:100000:1000,2000:300000:1", "0:200000:65536").unwrap();
        let line = format!("quiet {} panic=-1", maps.kernel_parameters().join(" "));
        assert!(line.contains("sandpod.uid_map=0:100000:1000,2000:300000:1 sandpod.gid_map=0:200000:65536"));
        assert_eq!(IdMaps::from_command_line(&line), Ok(Some(maps.clone())));
        assert_eq!(IdMaps::from_command_line("quiet"), Ok(None));
        assert_eq!(maps.files()[0], ("uid_map", "0 100000 1000\n2000 300000 1".into()));
        assert_eq!(
            (maps.user(999), maps.user(1000), maps.user(2000)),
            (Some(100_999), None, Some(300_000))
        );
        assert_eq!(maps.group(7), Some(200_007));
    }

    #[test]
    fn root_has_a_number_where_it_serves_files_unless_it_is_one_of_the_pods() {
        let maps = IdMaps::parse("0:100000:65536", "0:0:65536").unwrap();
        let served = maps.clone().with_server();
        assert_eq!(
            served.to_string(),
            "users 0:100000:65536,4294967294:0:1 groups 0:0:65536"
        );
        assert_eq!(served.clone().checked(), Ok(Some(served)));
        // A pod may have that number, but for which there is none left.
        let all = IdMaps::parse("4294967000:100000:295", "4294967000:100000:294").unwrap();
        let served = all.clone().with_server();
        assert_eq!(served.users, all.users);
        assert_eq!(served.groups.len(), 2);
        let last = IdMaps::parse("4294967294:1:1", "0:1:1").unwrap().with_server();
        assert_eq!((last.users.len(), last.groups.len()), (1, 2));
    }

    #[test]
    fn what_no_kernel_takes_is_refused() {
        let good = "0:100000:10";
        for bad in [
            "",
            "0:1",
            "0:1:2:3",
            "0:1:0",
            "0:4294967295:2",
            "x:1:1",
            "0:10:10,5:100:1",
            "0:10:10,20:19:1",
        ] {
            assert!(IdMaps::parse(bad, good).is_err(), "{bad}");
            assert!(IdMaps::parse(good, bad).is_err(), "{bad}");
        }
        let lonely = IdMaps::from_command_line("sandpod.uid_map=0:100000:10").unwrap_err();
        assert!(lonely.to_string().contains("no ID mappings"), "{lonely}");
    }
}
