//! What somebody who is root of the guest's kernel says to the share's server.
//!
//! Each message is one that the server must refuse, or one of the same kind that it must grant: so a refusal is not
//! that of a message that nobody understands.

mod lies;
mod links;
mod malformed;
mod places;

use nix::errno::Errno;
use tests::failure::Result;

pub use self::malformed::malformed;
use crate::fuse::{Answer, Body, Fuse, Op, TOP, name};

/// What is said when all answers were the right ones.
const RIGHT: &str = "answered as they should be";

/// Where the attacker is, by paths in the share.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// The container's root.
    pub root: String,
    /// A volume that may be written to, with a file `mine`.
    pub writable: String,
    /// A volume that may only be read, with a file `theirs`.
    pub readonly: String,
    /// A folder of the host's beside the two, by its path there, with a file `secret`.
    pub canary: String,
}

/// The nodes that the attack begins with.
struct Nodes {
    root: u64,
    writable: u64,
    readonly: u64,
    mine: u64,
    theirs: u64,
}

struct Attack {
    fuse: Fuse,
    world: World,
    told: Vec<String>,
}

/// Attacks the share. Returns a line for each message that was not answered as it should be, and one for what went
/// wrong with the device; without either, that all was right.
///
/// # Errors
/// There is no device.
pub fn whole(world: World) -> Result<String> {
    let mut attack = Attack {
        fuse: Fuse::take()?,
        world,
        told: Vec::new(),
    };
    let run = attack.run();
    let wrong = attack.told.iter().filter(|line| line.starts_with("WRONG"));
    let mut said: String = wrong.map(|line| format!("{line}\n")).collect();
    if let Err(failure) = run {
        let last = attack.told.last().map_or("nothing", String::as_str);
        said += &format!("{failure}, after {last}\n");
    }
    if said.is_empty() {
        said = format!("{RIGHT}: {} messages\n", attack.told.len());
    }
    Ok(said)
}

impl Attack {
    fn run(&mut self) -> Result {
        // Nobody has begun yet.
        self.refused(
            "a look before the beginning",
            Op::Lookup,
            TOP,
            &name("x"),
            &[Errno::EBADF],
        )?;
        self.again("the beginning")?;
        let nodes = self.nodes()?;
        self.what_is_granted(&nodes)?;
        self.the_top(&nodes)?;
        self.file_that_may_only_be_read(&nodes)?;
        self.folder_that_may_only_be_read(&nodes)?;
        self.names(&nodes)?;
        self.links(&nodes)?;
        self.names_through_links(&nodes)?;
        self.devices(&nodes)?;
        self.forged_handles(&nodes)?;
        self.forged_nodes(&nodes)?;
        let nodes = self.nodes()?;
        self.sizes(&nodes)?;
        self.headers(&nodes)?;
        self.endings()
    }

    fn told(&mut self, what: &str, right: bool, got: &str) {
        let verdict = if right { "as it should be" } else { "WRONG" };
        self.told.push(format!("{verdict}: {what}: {got}"));
    }

    fn refused(&mut self, what: &str, op: Op, node: u64, body: &Body, by: &[Errno]) -> Result {
        let answer = self.fuse.ask(op, node, body)?;
        self.judge(&format!("{op:?} {what}"), &answer, by);
        Ok(())
    }

    fn judge(&mut self, what: &str, answer: &Answer, by: &[Errno]) {
        match answer {
            Ok(bytes) => self.told(what, false, &format!("granted with {} bytes, not {by:?}", bytes.len())),
            Err(error) => self.told(what, by.contains(error), &format!("{error:?} of {by:?}")),
        }
    }

    fn granted(&mut self, what: &str, op: Op, node: u64, body: &Body) -> Result<Vec<u8>> {
        let answer = self.fuse.ask(op, node, body)?;
        self.told(
            &format!("{op:?} {what}"),
            answer.is_ok(),
            &format!("{:?}", answer.as_ref().err()),
        );
        Ok(answer.unwrap_or_default())
    }

    fn again(&mut self, what: &str) -> Result {
        let answer = self.fuse.init()?;
        self.told(what, answer.is_ok(), &format!("{:?}", answer.err()));
        Ok(())
    }

    fn nodes(&mut self) -> Result<Nodes> {
        let world = self.world.clone();
        let mut find = |path: &str| -> Result<u64> {
            let found = self.fuse.walk(path)?;
            self.told(path, found.is_ok(), &format!("{found:?}"));
            Ok(found.unwrap_or_default())
        };
        Ok(Nodes {
            root: find(&world.root)?,
            writable: find(&world.writable)?,
            readonly: find(&world.readonly)?,
            mine: find(&format!("{}/mine", world.writable))?,
            theirs: find(&format!("{}/theirs", world.readonly))?,
        })
    }
}

/// An absolute path as it is from any folder that is not very deep.
fn up(path: &str) -> String {
    format!("{}{}", "../".repeat(20), path.trim_start_matches('/'))
}
