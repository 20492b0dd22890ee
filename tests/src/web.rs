//! A client of the web servers that stories run in pods.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::{
    failure::{Failure, Result, Trying},
    node::Node,
    run,
};

/// How long a server may take to say something: more than a monitor waits for a guest that does not answer.
const PATIENCE: Duration = Duration::from_secs(15);

impl Node {
    /// The body of the answer to a GET on an address that the node reaches; a server that does not listen yet is asked
    /// again.
    ///
    /// # Errors
    /// [`Failure::Deadline`] with the last refusal.
    pub fn get(&self, ip: &str, port: u16, target: &str) -> Result<String> {
        let address: SocketAddr = format!("{ip}:{port}")
            .parse()
            .map_err(|error| Failure::Claim(format!("{ip}:{port}: {error}")))?;
        self.in_network(|| {
            self.events()
                .bell
                .until(&format!("an answer from {address}"), run::ORDINARY, || {
                    ask(address, target).map_err(|failure| failure.to_string())
                })
        })
    }
}

fn ask(address: SocketAddr, target: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).trying("connecting")?;
    stream.set_read_timeout(Some(PATIENCE)).trying("setting a deadline")?;
    let request = format!("GET {target} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).trying("asking")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).trying("reading the answer")?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => Err(Failure::Claim(format!("the web server answered {answer:?}"))),
    }
}
