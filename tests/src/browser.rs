//! A browser of a node: Chromium without a window, which this speaks to through a pipe, by its DevTools protocol
//! (<https://chromedevtools.github.io/devtools-protocol/>). It ends with the pipe, and keeps nothing.

use std::{
    cell::{Cell, RefCell},
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Instant,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    failure::{Failure, Result, Trying, claim},
    node::Node,
    run::{self, last_of},
    wait::patient,
};

/// The protocol's pipes are the descriptors 3 and 4, from which a message ends with a zero.
const START: &str = "exec chromium --headless --no-sandbox --remote-debugging-pipe --user-data-dir=\"$HOME\" \
    --disable-gpu --disable-breakpad --disable-background-networking --disable-component-update --no-first-run \
    3<&0 4>&1 </dev/null >\"$HOME/log\" 2>&1";

/// A promise of what an expression says as soon as that is neither empty nor false; asked at every change of the page.
const WHEN: &str = "new Promise(resolve => {
    const look = () => { const seen = EXPRESSION; if (seen) { changes.disconnect(); resolve(seen); } };
    const changes = new MutationObserver(look);
    changes.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
    look();
})";

/// A browser with one page.
pub struct Browser {
    // In this order they end: without its input the browser ends, and then its folder can be removed.
    input: Option<ChildStdin>,
    process: Option<Child>,
    home: TempDir,
    messages: Receiver<Value>,
    /// What was told before it was asked for.
    told: RefCell<Vec<Value>>,
    session: String,
    count: Cell<u64>,
}

impl Browser {
    /// Starts a browser in the node's network, and waits until it has loaded a page.
    ///
    /// # Errors
    /// There is no browser, or it does not load the page.
    pub fn open(node: &Node, url: &str) -> Result<Browser> {
        let home = tempfile::Builder::new()
            .prefix("browser-")
            .tempdir_in(node.path(""))
            .trying("making a browser's folder")?;
        let mut command = node.command("sh");
        for variable in ["HOME", "TMPDIR", "XDG_RUNTIME_DIR"] {
            command.env(variable, home.path());
        }
        let mut process = start(&mut command)?;
        let (told, messages) = channel();
        let output = process.stdout.take();
        thread::spawn(move || {
            let parts = BufReader::new(output?).split(0).map_while(std::result::Result::ok);
            // What is no message, and what nobody waits for any more, is nobody's.
            let messages = parts.filter_map(|part| serde_json::from_slice(&part).ok());
            messages.map(|message| told.send(message)).find(|sent| sent.is_err())
        });
        let mut browser = Browser {
            input: process.stdin.take(),
            process: Some(process),
            home,
            messages,
            told: RefCell::default(),
            session: String::new(),
            count: Cell::new(0),
        };
        browser.load(url)?;
        Ok(browser)
    }

    fn load(&mut self, url: &str) -> Result {
        let target = self.call("Target.createTarget", &json!({ "url": "about:blank" }))?["targetId"].take();
        let attach = json!({ "targetId": target, "flatten": true });
        let session = self.call("Target.attachToTarget", &attach)?;
        self.session = session["sessionId"].as_str().unwrap_or_default().to_owned();
        for part in ["Page.enable", "Log.enable"] {
            self.call(part, &json!({}))?;
        }
        let begun = self.call("Page.navigate", &json!({ "url": url }))?;
        claim(begun["errorText"].is_null(), format!("{url} is not loaded: {begun}"))?;
        let loaded = |message: &Value| message["method"] == "Page.loadEventFired";
        self.await_message("the page", loaded).map(drop)
    }

    /// The value of an expression of the page's script.
    ///
    /// # Errors
    /// What it throws.
    pub fn evaluate(&self, expression: &str) -> Result<Value> {
        let parameters = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let mut answer = self.call("Runtime.evaluate", &parameters)?;
        match &answer["exceptionDetails"] {
            Value::Null => Ok(answer["result"]["value"].take()),
            thrown => Err(Failure::Claim(format!("`{expression}` throws {thrown}"))),
        }
    }

    /// Waits until an expression is neither empty nor false, without loading the page anew; its value.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with what the page shows then.
    pub fn until(&self, what: &str, expression: &str) -> Result<Value> {
        self.evaluate(&WHEN.replace("EXPRESSION", expression))
            .map_err(|failure| {
                let shown = self.evaluate("document.body.innerText").unwrap_or_default();
                Failure::Claim(format!("{what}: {failure}; the page shows {shown}"))
            })
    }

    /// What the browser complains about: errors of scripts, and what the page's policy forbids.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let told = self.told.borrow();
        let entries = told.iter().filter(|message| message["method"] == "Log.entryAdded");
        entries.map(|message| message["params"]["entry"].to_string()).collect()
    }

    /// A picture of the whole page as a PNG in base64, so wide, and in the colours `light` or `dark`.
    ///
    /// # Errors
    /// The browser's.
    pub fn picture(&self, width: u32, colours: &str) -> Result<String> {
        let features = json!([{ "name": "prefers-color-scheme", "value": colours }]);
        self.call("Emulation.setEmulatedMedia", &json!({ "features": features }))?;
        let size =
            |height: &Value| json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", &size(&json!(100)))?;
        let height = self.evaluate("document.documentElement.scrollHeight")?;
        self.call("Emulation.setDeviceMetricsOverride", &size(&height))?;
        let picture = self.call("Page.captureScreenshot", &json!({ "format": "png" }))?;
        Ok(picture["data"].as_str().unwrap_or_default().to_owned())
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn close(mut self) -> Result {
        self.end()
    }

    fn end(&mut self) -> Result {
        drop(self.input.take());
        match self.process.take() {
            Some(process) => run::wait(process, run::ORDINARY, "chromium").map(drop),
            None => Ok(()),
        }
    }

    /// Asks the page, or the browser while there is none.
    fn call(&self, method: &str, parameters: &Value) -> Result<Value> {
        let number = self.count.get() + 1;
        self.count.set(number);
        let mut message = json!({ "id": number, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let mut input = self.input.as_ref().ok_or_else(|| self.ended())?;
        input.write_all(&bytes).map_err(|_| self.ended())?;
        let mut answer = self.await_message(method, |message| message["id"] == number)?;
        match &answer["error"] {
            Value::Null => Ok(answer["result"].take()),
            error => Err(Failure::Claim(format!("the browser answers {method} by {error}"))),
        }
    }

    fn await_message(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let end = Instant::now() + patient(run::ORDINARY);
        let mut told = self.told.borrow_mut();
        if let Some(at) = told.iter().position(&wanted) {
            return Ok(told.remove(at));
        }
        loop {
            match self
                .messages
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(message) if wanted(&message) => return Ok(message),
                Ok(message) => told.push(message),
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::Deadline {
                        what: what.into(),
                        deadline: run::ORDINARY,
                        detail: String::new(),
                    });
                }
            }
        }
    }

    fn ended(&self) -> Failure {
        let log = fs::read_to_string(self.home.path().join("log")).unwrap_or_default();
        Failure::Claim(format!("the browser has ended: {}", last_of(log.trim(), 500)))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Err(failure) = self.end() {
            eprintln!("a browser was not ended: {failure}");
        }
    }
}

fn start(shell: &mut Command) -> Result<Child> {
    shell.args(["-c", START]).process_group(0);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped());
    shell.spawn().trying("starting chromium")
}
