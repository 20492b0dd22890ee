//! CRI-O's way to a shim: the handler's start-up probes, the `start` action, and the options of Create.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use containerd_shim_protos::protobuf::{CodedOutputStream, well_known_types::any::Any};
use serde_json::Value;
use tests::{
    config::Guest,
    failure::{Failure, Result, Trying, claim},
    places,
    run::{self, Output, last_of},
    wait::patient,
};

use crate::{
    connection::Connection,
    fifo::{self, Reader},
    node::Node,
};

/// How long `start` may take.
const START: Duration = Duration::from_secs(20);

/// What is in the place of the VM runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// containerd's own shim for runc, which proves the stories.
    Reference,
    /// Ours.
    Sandpod,
}

impl Runtime {
    /// The prefix of its stories' names.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Reference => "reference",
            Runtime::Sandpod => "sandpod",
        }
    }

    /// Where its program is, as a handler's `runtime_path` says.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn path(self) -> Result<PathBuf> {
        match self {
            Runtime::Reference => Ok("/usr/bin/containerd-shim-runc-v2".into()),
            Runtime::Sandpod => Ok(places::binaries()?.join("containerd-shim-kata-v2")),
        }
    }
}

/// A CRI-O with one runtime handler.
#[derive(Debug)]
pub struct Crio<'n> {
    /// The node it runs on.
    pub node: &'n Node,
    /// What its handler is.
    pub runtime: Runtime,
    path: PathBuf,
    /// The handler's `runtime_config_path`.
    config: Option<PathBuf>,
    logs: Mutex<BTreeMap<String, Reader>>,
}

impl<'n> Crio<'n> {
    /// A CRI-O whose handler is configured as the runtime needs it on this machine.
    ///
    /// # Errors
    /// When something has not been built.
    pub fn new(node: &'n Node, runtime: Runtime) -> Result<Crio<'n>> {
        let path = runtime.path()?;
        let crio = Crio {
            node,
            runtime,
            path,
            config: None,
            logs: Mutex::default(),
        };
        match runtime {
            Runtime::Reference => Ok(crio),
            Runtime::Sandpod => crio.configured(&Guest::Own.configuration()?),
        }
    }

    /// The same with another configuration.toml.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configured(mut self, text: &str) -> Result<Crio<'n>> {
        let path = self.node.folder().join("configuration.toml");
        fs::write(&path, text).trying("writing configuration.toml")?;
        self.config = Some(path);
        Ok(self)
    }

    /// Runs a sub-command of the shim as CRI-O does at its start-up.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn probe(&self, argument: &str) -> Result<Output> {
        run::finish(Command::new(&self.path).arg(argument), None, START)
    }

    /// The shim's file name, which CRI-O checks.
    pub fn basename(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Runs the `start` action for a container and returns the address it printed; the bundle must hold the address
    /// too.
    ///
    /// # Errors
    /// When the shim fails, prints something else, or keeps the pipes open.
    pub fn start(&self, id: &str, bundle: &Path) -> Result<String> {
        let fifo = bundle.join("log");
        fifo::make(&fifo)?;
        let log = Reader::open(&fifo)?;
        self.logs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id.into(), log);
        let output = self.run_start(id, bundle)?;
        let said = format!("{} {}", output.text(), output.errors());
        claim(
            output.code == 0,
            format!("`start` of {id} ended with code {}: {}", output.code, said.trim()),
        )?;
        let address = address_in(&output.text())?;
        let path = bundle.join("address");
        let written = fs::read_to_string(&path).trying(format!("reading {}", path.display()))?;
        claim(
            written == address,
            format!("{} holds {written:?}, but `start` printed {address:?}", path.display()),
        )?;
        Ok(address)
    }

    /// The pipes are read to their end before the exit is looked at: a daemon that keeps them open blocks CRI-O.
    fn run_start(&self, id: &str, bundle: &Path) -> Result<Output> {
        let mut command = Command::new(&self.path);
        command.args([
            "-namespace",
            "default",
            "-address",
            "",
            "-publish-binary",
            "/usr/bin/crio",
            "-id",
            id,
            "start",
        ]);
        command.current_dir(bundle).process_group(0);
        let environment = [
            ("GOMAXPROCS", "2"),
            ("MAX_SHIM_VERSION", "2"),
            ("TTRPC_ADDRESS", ""),
            ("GRPC_ADDRESS", ""),
            ("NAMESPACE", "default"),
        ];
        command.envs(environment);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().trying(format!("starting {}", self.path.display()))?;
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let read = |pipe: mpsc::Receiver<Vec<u8>>, name: &str| {
            let what = format!("the end of {name} of `start`");
            pipe.recv_timeout(patient(START)).map_err(|_| Failure::Deadline {
                what,
                deadline: START,
                detail: "; is it inherited?".into(),
            })
        };
        let (stdout, stderr) = (read(stdout, "stdout")?, read(stderr, "stderr")?);
        let status = run::wait(child, START, "containerd-shim start")?;
        Ok(Output {
            code: run::code_of(status),
            stdout,
            stderr,
        })
    }

    /// Dials the shim of a container by the `address` file of its bundle, as after a restart.
    ///
    /// # Errors
    /// When there is none, or nobody listens.
    pub fn redial(&self, bundle: &Path) -> Result<Connection> {
        let path = bundle.join("address");
        let address = fs::read_to_string(&path).trying(format!("reading {}", path.display()))?;
        Connection::dial(address.trim())
    }

    /// The options of Create: `runtimeoptions.v1.Options{config_path}`, or nothing when the handler has no
    /// configuration.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn options(&self) -> Result<Option<Any>> {
        let Some(config) = &self.config else { return Ok(None) };
        let mut value = Vec::new();
        let mut out = CodedOutputStream::vec(&mut value);
        let encoded = out
            .write_string(2, &config.display().to_string())
            .and_then(|()| out.flush());
        drop(out);
        encoded
            .map_err(std::io::Error::other)
            .trying("encoding the runtime options")?;
        Ok(Some(Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value,
            ..Any::default()
        }))
    }

    /// What the shims have logged through the `log` fifos of their bundles, for a failure's message.
    pub fn log(&self) -> String {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let said = |(id, log): (&String, &Reader)| {
            let text = log.text();
            (!text.is_empty()).then(|| {
                format!(
                    "\n--- the shim's log in the bundle of {}:\n{}",
                    short(id),
                    last_of(&text, 4000)
                )
            })
        };
        logs.iter().filter_map(said).collect()
    }

    /// CRI-O closes its end of a container's log when the container is gone.
    pub fn forget_log(&self, id: &str) {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

/// The beginning of an id, enough to tell it from others.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// CRI-O's reading of what `start` prints: JSON of version 2 or a bare address.
fn address_in(text: &str) -> Result<String> {
    let json: Option<Value> = serde_json::from_str(text).ok();
    let Some(version) = json
        .as_ref()
        .and_then(|json| json["version"].as_i64())
        .filter(|version| *version >= 2)
    else {
        return Ok(text.to_owned());
    };
    claim(version == 2, format!("unsupported shim version {version}"))?;
    let address = json
        .as_ref()
        .and_then(|json| json["address"].as_str())
        .unwrap_or_default();
    claim(!address.is_empty(), format!("no address in {text:?}"))?;
    Ok(address.to_owned())
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (told, collected) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A read error ends the text early; what was read so far is still worth showing.
            drop(pipe.read_to_end(&mut bytes));
        }
        let _ = told.send(bytes);
    });
    collected
}
