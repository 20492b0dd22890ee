//! How far apart two wall clocks are, over UDP.
//!
//! ```text
//! clock-offset answer <address:port>
//! clock-offset ask <address:port> <trips>
//! ```
//!
//! `answer` sends each datagram's number back with the time, in nanoseconds since the epoch. `ask` prints the offset of
//! the answering clock, and by how much that may be wrong, in nanoseconds.
//!
//! Of all round trips the shortest counts: the answering clock was read somewhere on the way, so the offset to the
//! middle is wrong by half of it at most.

use std::{
    env,
    error::Error,
    net::UdpSocket,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long an answer is waited for; a trip that takes longer says nothing of a clock.
const PATIENCE: Duration = Duration::from_secs(2);

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["answer", address] => answer(address),
        ["ask", address, trips] => ask(address, trips),
        _ => Err("usage: clock-offset answer <address:port> | ask <address:port> <trips>".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clock-offset: {error}");
            ExitCode::FAILURE
        }
    }
}

fn now() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos().try_into()?)
}

/// Answers until it is killed.
fn answer(address: &str) -> Result {
    let socket = UdpSocket::bind(address)?;
    let mut number = [0; 4];
    loop {
        let (_, from) = socket.recv_from(&mut number)?;
        let told = [&number[..], &now()?.to_be_bytes()].concat();
        socket.send_to(&told, from)?;
    }
}

fn ask(address: &str, trips: &str) -> Result {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut best: Option<(i64, i64)> = None;
    for number in 0..trips.parse::<u32>()? {
        let Some((sent, told, back)) = trip(&socket, number)? else {
            continue;
        };
        let half = (back - sent) / 2;
        if best.is_none_or(|(_, shortest)| half < shortest) {
            best = Some((told - (sent + half), half));
        }
    }
    let (offset, half) = best.ok_or("no answer")?;
    println!("{offset} {half}");
    Ok(())
}

/// When the question was sent, what the other clock said, and when that had come; `None` of a question that is lost, or
/// during which our own clock was set.
fn trip(socket: &UdpSocket, number: u32) -> Result<Option<(i64, i64, i64)>> {
    let sent = now()?;
    // The one who answers may not be there yet: the kernel tells of that at the next call.
    if socket.send(&number.to_be_bytes()).is_err() {
        return Ok(None);
    }
    let mut bytes = [0; 12];
    loop {
        let Ok(12) = socket.recv(&mut bytes) else {
            return Ok(None);
        };
        let back = now()?;
        // An answer that was given up comes late.
        if bytes[..4] == number.to_be_bytes() {
            let told = i64::from_be_bytes(bytes[4..].try_into()?);
            return Ok((back >= sent).then_some((sent, told, back)));
        }
    }
}
