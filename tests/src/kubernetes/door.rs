//! A door into another network: a port of the machine's loopback behind which a port of the other's loopback is.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use crate::{
    failure::{Failure, Result, Trying},
    namespaces::Namespaces,
};

/// An open door; it closes with this value.
#[derive(Debug)]
pub struct Door {
    port: u16,
    closing: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
}

impl Door {
    /// Opens a port that nobody uses to `inner` in the namespaces' network.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(namespaces: &Namespaces, inner: u16) -> Result<Door> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).trying("opening a port")?;
        let port = listener.local_addr().trying("asking for the port")?.port();
        let closing = Arc::new(AtomicBool::new(false));
        let network = namespaces.inside("/proc/1/ns/net");
        let (told, entered) = mpsc::channel();
        let closed = Arc::clone(&closing);
        let keeper = thread::spawn(move || {
            // A socket stays in the network that it was made in, so guests come in here and go on there.
            let inside = Namespaces::enter(&network);
            let works = inside.is_ok();
            // Whoever opens the door waits for this answer.
            drop(told.send(inside));
            for guest in listener.incoming().flatten().take_while(|_| works) {
                if closed.load(Ordering::Acquire) {
                    break;
                }
                if let Ok(host) = TcpStream::connect((Ipv4Addr::LOCALHOST, inner)) {
                    join(guest, host);
                }
            }
        });
        let gone = |_| Failure::Claim("the keeper of a door is gone".into());
        entered.recv().map_err(gone)??;
        Ok(Door {
            port,
            closing,
            keeper: Some(keeper),
        })
    }

    /// The port on the machine's loopback.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Release);
        // Wakes the keeper. Where nobody listens any more, nobody needs to be woken.
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
        drop(self.keeper.take().map(JoinHandle::join));
    }
}

/// Copies both ways until both sides have ended.
fn join(guest: TcpStream, host: TcpStream) {
    for stream in [&guest, &host] {
        // Small answers are not held back for larger ones; without it they are only slower.
        drop(stream.set_nodelay(true));
    }
    let (Ok(guest_too), Ok(host_too)) = (guest.try_clone(), host.try_clone()) else {
        return;
    };
    thread::spawn(move || pour(guest_too, host_too));
    thread::spawn(move || pour(host, guest));
}

fn pour(mut from: TcpStream, mut to: TcpStream) {
    // An error ends this direction as an end does; the sides see it by what they miss.
    drop(io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
}
