//! A VM's owner, with a VM that is made up.

use std::sync::{Mutex, PoisonError};

use config::Config;
use tokio::time::{sleep, timeout};

use super::*;
use crate::{manifest::Kernel, sizing::Host};

/// How often a test looks.
const LOOK: Duration = Duration::from_millis(5);

/// What the owner asked the VM for.
type Asked = Arc<Mutex<Vec<String>>>;

fn sizing() -> Sizing {
    let config = Config::parse("", &[]).unwrap();
    let host = Host {
        memory_mib: 65536,
        cpus: 16,
    };
    Sizing::on(host, &Kernel::default(), &config, None)
}

fn memory(mib: u64) -> Limits {
    Limits {
        memory: Some(mib << 20),
        ..Limits::default()
    }
}

/// A VM that grows at once, unless it refuses, and whose guest gives nothing back.
fn stubborn(refusals: u32) -> (Sizer, Asked) {
    let asked = Asked::default();
    let (changes, queue) = mpsc::unbounded_channel();
    let (told, refused) = (asked.clone(), AtomicU32::new(refusals));
    let resize = move |resize: Resize| {
        let (word, shrink) = match resize {
            Resize::Grow(target) => (format!("grow to {}", target.memory_mib), None),
            Resize::Shrink(target, wanted) => (format!("shrink to {}", target.memory_mib), Some(wanted)),
        };
        let take_one = |left: u32| left.checked_sub(1);
        let refuses = refused
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take_one)
            .is_ok();
        let told = told.clone();
        async move {
            told.lock().unwrap_or_else(PoisonError::into_inner).push(word);
            while shrink.as_ref().is_some_and(Wanted::still) {
                sleep(LOOK).await;
            }
            match refuses {
                true => Err(Error::Precondition("no slot".into())),
                false => Ok(()),
            }
        }
    };
    tokio::spawn(own(resize, sizing(), queue));
    (Sizer { changes }, asked)
}

fn said(asked: &Asked) -> Vec<String> {
    std::mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Waits until the VM is asked to shrink.
async fn shrinks(asked: &Asked) {
    let patience = Duration::from_secs(300);
    let shrink = async {
        while !asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|word| word.starts_with("shrink"))
        {
            sleep(LOOK).await;
        }
    };
    timeout(patience, shrink).await.expect("a shrink");
}

#[tokio::test]
async fn a_container_that_is_started_again_finds_its_memory_still_there() {
    let (sizer, asked) = stubborn(0);
    sizer.set("a", memory(1024)).await.unwrap();
    for _ in 0..3 {
        sizer.remove("a");
        sizer.set("a", memory(1024)).await.unwrap();
    }
    sizer.remove("a");
    shrinks(&asked).await;
    assert_eq!(said(&asked), ["grow to 3072", "shrink to 2048"]);
}

#[tokio::test]
async fn changes_that_wait_are_one_change() {
    let (sizer, asked) = stubborn(0);
    let all = ["a", "b", "c"].map(|container| sizer.set(container, memory(512)));
    futures::future::try_join_all(all).await.unwrap();
    assert_eq!(said(&asked), ["grow to 3584"]);
}

#[tokio::test]
async fn a_shrink_holds_up_no_container() {
    let (sizer, asked) = stubborn(0);
    sizer.set("a", memory(4096)).await.unwrap();
    sizer.remove("a");
    shrinks(&asked).await;
    assert_eq!(said(&asked), ["grow to 6144", "shrink to 2048"]);
    // The guest has given nothing back, and is asked for nothing any more.
    sizer.set("b", memory(1024)).await.unwrap();
    assert_eq!(said(&asked), ["grow to 3072"]);
}

#[tokio::test]
async fn a_limit_that_falls_is_not_waited_for() {
    let (sizer, asked) = stubborn(0);
    sizer.set("a", memory(4096)).await.unwrap();
    let before = sizer.grow("a", memory(1024)).await.unwrap();
    assert_eq!(before, memory(4096));
    sizer.set("a", memory(1024)).await.unwrap();
    shrinks(&asked).await;
    assert_eq!(said(&asked), ["grow to 6144", "shrink to 3072"]);
}

#[tokio::test]
async fn a_vm_that_refused_is_asked_again() {
    let (sizer, asked) = stubborn(1);
    let refused = sizer.set("a", memory(1024)).await.unwrap_err();
    assert_eq!(refused.to_string(), "no slot");
    sizer.set("a", memory(1024)).await.unwrap();
    assert_eq!(said(&asked), ["grow to 3072", "grow to 3072"]);
}
