//! A door into another network: a port of the machine's loopback behind which a port of the other's loopback is.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
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
    /// How often it has fallen silent.
    silences: Arc<AtomicU64>,
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
        let silences = Arc::<AtomicU64>::default();
        let fallen = Arc::clone(&silences);
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
                    join(guest, host, &Silence::of(&fallen));
                }
            }
        });
        let gone = |_| Failure::Claim("the keeper of a door is gone".into());
        entered.recv().map_err(gone)??;
        Ok(Door {
            port,
            closing,
            silences,
            keeper: Some(keeper),
        })
    }

    /// From now on nobody hears anything by the connections that there are, and none of them ends: as when a firewall has
    /// forgotten them. New ones are as before.
    pub fn fall_silent(&self) {
        self.silences.fetch_add(1, Ordering::AcqRel);
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

/// Whether the door has fallen silent since a connection was made.
#[derive(Clone)]
struct Silence {
    before: u64,
    now: Arc<AtomicU64>,
}

impl Silence {
    fn of(now: &Arc<AtomicU64>) -> Silence {
        Silence {
            before: now.load(Ordering::Acquire),
            now: Arc::clone(now),
        }
    }

    fn fallen(&self) -> bool {
        self.now.load(Ordering::Acquire) != self.before
    }
}

/// Copies both ways until both sides have ended.
fn join(guest: TcpStream, host: TcpStream, silence: &Silence) {
    for stream in [&guest, &host] {
        // Small answers are not held back for larger ones; without it they are only slower.
        drop(stream.set_nodelay(true));
    }
    let (Ok(guest_too), Ok(host_too)) = (guest.try_clone(), host.try_clone()) else {
        return;
    };
    let (out, back) = (silence.clone(), silence.clone());
    thread::spawn(move || pour(guest_too, host_too, &out));
    thread::spawn(move || pour(host, guest, &back));
}

/// An error ends this direction as an end does; the sides see it by what they miss.
fn pour(mut from: TcpStream, mut to: TcpStream, silence: &Silence) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let heard = buffer.get(..length).unwrap_or_default();
        if !silence.fallen() && to.write_all(heard).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}
