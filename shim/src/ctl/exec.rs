//! `kata-ctl exec`: a shell in the guest of a sandbox, by its shim's debug console.

use std::{
    fs::File,
    io::{self, IsTerminal, stdin, stdout},
    net::Shutdown,
    os::fd::AsFd,
    thread,
    time::Duration,
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::{
    error::{Context, Result},
    http, metrics, sys,
};

/// How long the guest may take to start the shell.
const START: Duration = Duration::from_secs(60);

/// Runs a shell on this program's standard input and output, to the shell's end.
///
/// # Errors
/// There is no such sandbox, its shim refuses, or the terminal does.
pub async fn exec(sandbox: &str) -> Result<()> {
    let socket = metrics::socket(sandbox);
    let terminal = stdin().is_terminal();
    let mut target = "/exec".to_owned();
    if terminal {
        let size = sys::window_size(stdin().as_fd()).action("look at the terminal")?;
        let kind = std::env::var("TERM").unwrap_or_default();
        // A word in a query needs no escapes.
        let kind: String = kind
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .collect();
        target += &format!("?rows={}&columns={}&term={kind}", size.ws_row, size.ws_col);
    }
    let stream = http::upgrade(&socket, &target, START).await.at("ask", &socket)?;
    let stream = stream.into_std().action("talk to the shim")?;
    stream.set_nonblocking(false).action("talk to the shim")?;
    let raw = if terminal {
        Some(Raw::enter().action("prepare the terminal")?)
    } else {
        None
    };

    // Not by the standard library's own handles: those of the output hold a line back until it is whole.
    let open = |stream: io::Result<_>| stream.map(File::from).action("open a standard stream");
    let mut keyboard = open(stdin().as_fd().try_clone_to_owned())?;
    let mut screen = open(stdout().as_fd().try_clone_to_owned())?;
    let mut typed = stream.try_clone().action("talk to the shim")?;
    // It ends with the program: nobody can wake it from a read.
    thread::spawn(move || {
        let _shell_gone = io::copy(&mut keyboard, &mut typed).and_then(|_| typed.shutdown(Shutdown::Write));
    });
    let shown = io::copy(&mut &stream, &mut screen).action("show the shell's output");
    drop(raw);
    shown.map(drop)
}

/// A terminal that hands every key to the shell; as it was before when this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> nix::Result<Raw> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _gone = tcsetattr(stdin(), SetArg::TCSANOW, &self.0);
    }
}
