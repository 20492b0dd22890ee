//! A person at a terminal.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::{Child, Command},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use nix::{
    pty::{Winsize, openpty},
    unistd::ttyname,
};

use crate::{
    failure::{Failure, Result, Trying},
    node::Node,
    run,
    wait::Bell,
};

/// A client that runs on a terminal of its own.
pub struct Console {
    client: Child,
    keyboard: File,
    screen: Arc<Screen>,
    terminal: OwnedFd,
}

#[derive(Default)]
struct Screen {
    shown: Mutex<String>,
    bell: Bell,
}

impl Console {
    /// Starts a client (a command of the node) with a new 80×24 terminal as its controlling one.
    ///
    /// # Errors
    /// When the terminal cannot be made, or the client not be started.
    pub fn start(node: &Node, client: &Command) -> Result<Console> {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = openpty(&size, None).trying("making a terminal")?;
        let end = || pair.slave.try_clone().trying("sharing the terminal");
        // The client must lead a session to be told of the terminal's new sizes.
        let mut words = client.get_args().skip_while(|word| *word != "--").skip(1);
        let program = words.next().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = node.command("setsid");
        command.args(["--ctty", "--wait", &program]).args(words);
        let client = command
            .stdin(end()?)
            .stdout(end()?)
            .stderr(end()?)
            .spawn()
            .trying(format!("starting {program}"))?;
        let screen = Arc::new(Screen::default());
        let keyboard = File::from(pair.master);
        screen.show(keyboard.try_clone().trying("sharing the terminal")?);
        Ok(Console {
            client,
            keyboard,
            screen,
            terminal: pair.slave,
        })
    }

    /// Types a line.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn enter(&mut self, line: &str) -> Result {
        self.keyboard.write_all(format!("{line}\r").as_bytes()).trying("typing")
    }

    /// Waits until the screen shows a text.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with what it shows instead.
    pub fn expect(&self, text: &str) -> Result {
        self.screen
            .bell
            .until(&format!("{text:?} on the terminal"), run::ORDINARY, || {
                let shown = self.shown();
                if shown.contains(text) {
                    Ok(())
                } else {
                    Err(run::last_of(&shown, 1000))
                }
            })
    }

    /// Everything shown so far.
    #[must_use]
    pub fn shown(&self) -> String {
        self.screen.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the size of the terminal's window.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, columns: u16, rows: u16) -> Result {
        let device = ttyname(&self.terminal).trying("naming the terminal")?;
        let mut command = Command::new("stty");
        command
            .arg("-F")
            .arg(device)
            .args(["cols", &columns.to_string(), "rows", &rows.to_string()]);
        run::succeed(&mut command, run::ORDINARY).map(drop)
    }

    /// Waits for the client's end and returns its exit code.
    ///
    /// # Errors
    /// [`Failure::Deadline`] when it has to be killed.
    pub fn wait(self, deadline: Duration) -> Result<i32> {
        let shown = self.shown();
        run::wait(self.client, deadline, "a client on a terminal")
            .map(run::code_of)
            .map_err(|failure| match failure {
                Failure::Deadline { what, deadline, .. } => Failure::Deadline {
                    what,
                    deadline,
                    detail: format!("; on its screen: {}", run::last_of(&shown, 1000)),
                },
                other => other,
            })
    }
}

impl Screen {
    fn show(self: &Arc<Self>, mut terminal: File) {
        let screen = Arc::clone(self);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = terminal.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                screen
                    .shown
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&text);
                screen.bell.ring();
            }
        });
    }
}
