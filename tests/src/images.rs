//! The images of every node: [`PAUSE`], which only sleeps, and [`TEST`], with busybox, coreutils, `inotifywait`,
//! `flock`, `setarch`, `setfattr`, a web page under /www, and the users root and app (1000), and [`HELLO`], a web
//! server as the documentation's examples run it. They share their first layers.

use std::path::{Path, PathBuf};

use crate::{
    failure::Result,
    oci::{self, Layout, Package, Packages, Tree},
};

/// The image that stories run.
pub const TEST: &str = "docker.io/library/sandpod-test:latest";

/// The sandbox image, under the name that containerd is configured with.
pub const PAUSE: &str = "registry.k8s.io/pause:3.9";

/// The image of the documentation's examples, under their name for it. It listens at [`HELLO_PORT`].
pub const HELLO: &str = "quay.io/openshift/origin-hello-openshift:latest";

/// Where [`HELLO`] listens.
pub const HELLO_PORT: u16 = 8888;

/// What [`HELLO`] answers to `GET /`.
pub const GREETING: &str = "Hello OpenShift!\n";

/// What [`HELLO`] runs, as whatever user; it logs each request.
const HELLO_COMMAND: &[&str] = &["/usr/bin/busybox", "httpd", "-f", "-vv", "-p", "8888", "-h", "/hello"];

/// What the web server in the test image answers to `GET /`.
pub const PAGE: &str = "hello from a pod\n";

/// Lists the network interfaces, in a shell of any image. The bonding driver has a file of its own beside them.
pub const INTERFACES: &str = "cd /sys/class/net && ls -d */ | tr -d /";

/// The one of [`PAUSE`].
const BUSYBOX: Package = ("busybox-static", &["bin/busybox"]);

/// Those of [`TEST`] besides.
const PACKAGES: &[Package] = &[
    ("coreutils", &["bin/", "usr/bin/", "usr/sbin/"]),
    ("inotify-tools", &["usr/bin/inotifywait"]),
    ("libinotifytools0", &["usr/lib/x86_64-linux-gnu/"]),
    ("util-linux", &["usr/bin/flock", "usr/bin/setarch"]),
    ("attr", &["usr/bin/getfattr", "usr/bin/setfattr"]),
    ("libacl1", &["usr/lib/x86_64-linux-gnu/"]),
    ("libattr1", &["usr/lib/x86_64-linux-gnu/"]),
    (
        "libc6",
        &["lib/x86_64-linux-gnu/ld-", "lib/x86_64-linux-gnu/libc.", "lib64/"],
    ),
    ("libgmp10", &["usr/lib/x86_64-linux-gnu/"]),
    ("libpcre2-8-0", &["usr/lib/x86_64-linux-gnu/"]),
    ("libselinux1", &["lib/x86_64-linux-gnu/"]),
];

/// Sleeps until told to end, and collects orphans: what a pause container is for.
const PAUSE_SCRIPT: &str = "trap 'exit 0' TERM INT; while :; do busybox sleep 2147483647 & wait $!; done";

const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
    ),
    ("etc/group", "root:x:0:\napp:x:1000:\nextra:x:2000:app\n"),
    ("www/index.html", PAGE),
];

/// Directories besides those that files bring along: path, mode, owner.
const FOLDERS: &[(&str, u32, u64)] = &[
    ("dev", 0o755, 0),
    ("home/app", 0o755, 1000),
    ("proc", 0o755, 0),
    ("root", 0o700, 0),
    ("run", 0o755, 0),
    ("sys", 0o755, 0),
    ("tmp", 0o1777, 0),
    ("var/tmp", 0o1777, 0),
];

/// The archive's path; made now if it is not cached.
///
/// # Errors
/// When Debian's packages cannot be fetched or unpacked.
pub fn archive() -> Result<PathBuf> {
    let recipe = format!(
        "{BUSYBOX:?}{PACKAGES:?}{PAUSE_SCRIPT}{FILES:?}{FOLDERS:?}{TEST}{PAUSE}{HELLO_COMMAND:?}{GREETING} version 2"
    );
    oci::archive(&recipe, make)
}

fn make(build: &Path) -> Result<Layout> {
    let packages = Packages::fetch(build, PACKAGES.iter().chain([&BUSYBOX]))?;
    let base = base(&packages)?;
    let mut test = Tree::default();
    packages.unpack(PACKAGES, &mut test)?;
    for applet in base.applets(build)? {
        test.symlink(&format!("usr/bin/{applet}"), "busybox");
    }
    for (path, text) in FILES {
        test.file(path, 0o644, *text);
    }
    let mut hello = Tree::default();
    hello.file("hello/index.html", 0o644, GREETING);
    let mut layout = Layout::default();
    let (base, test, hello) = (layout.layer(&base)?, layout.layer(&test)?, layout.layer(&hello)?);
    layout.image(PAUSE, &[&base], PAUSE_COMMAND, "");
    layout.image(TEST, &[&base, &test], &["/bin/sh"], "");
    layout.image(HELLO, &[&base, &test, &hello], HELLO_COMMAND, "");
    Ok(layout)
}

/// An image of so many layers with busybox in the lowest and one file in /layer from each of the others.
pub const LAYERED: &str = "docker.io/library/sandpod-layered:latest";

/// The archive of [`LAYERED`]; made now if it is not cached.
///
/// # Errors
/// As above.
pub fn layered(layers: usize) -> Result<PathBuf> {
    let recipe = format!("{BUSYBOX:?}{FOLDERS:?}{LAYERED}{layers}");
    oci::archive(&recipe, |build| {
        let packages = Packages::fetch(build, [&BUSYBOX])?;
        let mut layout = Layout::default();
        let mut all = vec![layout.layer(&base(&packages)?)?];
        for number in 1..layers {
            let mut tree = Tree::default();
            tree.file(&format!("layer/{number}"), 0o644, number.to_string());
            all.push(layout.layer(&tree)?);
        }
        layout.image(LAYERED, &all.iter().collect::<Vec<_>>(), &["/bin/sh"], "");
        Ok(layout)
    })
}

/// What the pause image runs.
pub const PAUSE_COMMAND: &[&str] = &["/bin/busybox", "sh", "-c", PAUSE_SCRIPT];

/// The lowest layer of every image: empty folders, busybox and its shell.
fn base(packages: &Packages) -> Result<Tree> {
    let mut tree = Tree::lowest();
    for (path, mode, owner) in FOLDERS {
        tree.folder(path, *mode, *owner);
    }
    packages.unpack([&BUSYBOX], &mut tree)?;
    tree.symlink("usr/bin/sh", "busybox");
    Ok(tree)
}
