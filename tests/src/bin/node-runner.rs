//! The harness' hands inside an emulated node: runs what comes over a virtio-serial port, several programs at once.
//!
//! `node-runner <port>` is a service of the node; the frames are those of `tests::machine::wire`.

use std::{
    collections::BTreeMap,
    env, fs,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Sender},
    },
    thread,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tests::{
    machine::wire::{self, Frame, Kind, LONGEST, Run},
    run::code_of,
};

fn main() -> ExitCode {
    let Some(port) = env::args().nth(1) else {
        eprintln!("node-runner: the path of the port is missing");
        return ExitCode::FAILURE;
    };
    match serve(&port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-runner: {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until the harness closes its end.
fn serve(port: &str) -> io::Result<()> {
    let mut frames = OpenOptions::new().read(true).write(true).open(port)?;
    let harness = Harness(Arc::new(Mutex::new(frames.try_clone()?)));
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    harness.tell(0, Kind::Hello, boot.trim().as_bytes())?;
    let mut running = BTreeMap::new();
    while let Some(frame) = wire::read(&mut frames)? {
        obey(&harness, &mut running, frame)?;
    }
    Ok(())
}

/// A program that was started.
struct Program {
    group: Pid,
    input: Option<Sender<Vec<u8>>>,
}

fn obey(harness: &Harness, running: &mut BTreeMap<u32, Program>, frame: Frame) -> io::Result<()> {
    let number = frame.command;
    match (frame.kind, running.get_mut(&number)) {
        (Kind::Run, _) => {
            let run = Run::parse(&frame.bytes)?;
            match start(harness, number, &run) {
                Ok(program) => drop(running.insert(number, program)),
                Err(error) => {
                    let text = format!("node-runner: starting {}: {error}\n", run.words[0]);
                    harness.tell(number, Kind::Stderr, text.as_bytes())?;
                    harness.tell(number, Kind::Exit, &127_i32.to_be_bytes())?;
                }
            }
        }
        (Kind::Input, Some(program)) if frame.bytes.is_empty() => program.input = None,
        // A program that reads no more says so by its exit code.
        (Kind::Input, Some(program)) => drop(program.input.as_ref().map(|input| input.send(frame.bytes))),
        // One that has ended is as good as killed.
        (Kind::Kill, Some(program)) => drop(killpg(program.group, Signal::SIGKILL)),
        (kind, _) => return Err(io::Error::other(format!("{kind:?} for command {number}"))),
    }
    Ok(())
}

fn start(harness: &Harness, number: u32, run: &Run) -> io::Result<Program> {
    let mut command = Command::new(&run.words[0]);
    command.args(&run.words[1..]).process_group(0);
    command.stdin(if run.input { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let program = Program {
        group: Pid::from_raw(child.id().cast_signed()),
        input: child.stdin.take().map(feed),
    };
    let harness = harness.clone();
    thread::spawn(move || attend(&harness, number, child));
    Ok(program)
}

/// Writes what comes to a program, and closes it when nothing more can come.
fn feed(mut pipe: ChildStdin) -> Sender<Vec<u8>> {
    let (sender, bytes) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || bytes.iter().try_for_each(|bytes| pipe.write_all(&bytes)));
    sender
}

/// Tells of a program's output and end. When the harness has gone there is nobody to tell.
fn attend(harness: &Harness, number: u32, mut child: Child) {
    let outputs = [
        child.stdout.take().map(|pipe| harness.pump(number, Kind::Stdout, pipe)),
        child.stderr.take().map(|pipe| harness.pump(number, Kind::Stderr, pipe)),
    ];
    for output in outputs.into_iter().flatten() {
        drop(output.join());
    }
    let code = child.wait().map_or(127, code_of);
    drop(harness.tell(number, Kind::Exit, &code.to_be_bytes()));
}

/// The way back.
#[derive(Clone)]
struct Harness(Arc<Mutex<File>>);

impl Harness {
    fn tell(&self, command: u32, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write(&mut *port, command, kind, bytes)
    }

    fn pump(&self, command: u32, kind: Kind, mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<()> {
        let harness = self.clone();
        thread::spawn(move || {
            let mut bytes = vec![0; LONGEST];
            while let Ok(count @ 1..) = pipe.read(&mut bytes) {
                if harness.tell(command, kind, &bytes[..count]).is_err() {
                    break;
                }
            }
        })
    }
}
