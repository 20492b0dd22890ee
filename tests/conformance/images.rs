//! The images that critest names, made of Debian packages, for the registry of the node.
//!
//! What they must hold is what critest's specs do with them (pkg/validate of cri-tools, and its images folder).

use std::path::{Path, PathBuf};

use tests::{
    failure::Result,
    images::{PAUSE, PAUSE_COMMAND},
    oci::{self, Layout, Package, Packages, Tree},
};

use crate::registry;

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu/";
const ROOT_LIBRARIES: &str = "lib/x86_64-linux-gnu/";

/// The dynamic busybox: the shell of the static one runs its own `ls` even where a mount hides it.
const BUSYBOX: &[Package] = &[
    ("busybox", &["bin/busybox"]),
    (
        "libc6",
        &[
            "lib/x86_64-linux-gnu/ld-",
            "lib/x86_64-linux-gnu/libc.",
            "lib/x86_64-linux-gnu/libresolv.",
            "lib64/",
        ],
    ),
];

/// `pgrep` and `ipcs`, which Debian's busybox lacks, and their libraries.
const TOOLS: &[Package] = &[
    ("procps", &["usr/bin/pgrep"]),
    ("util-linux", &["usr/bin/ipcs"]),
    ("libcap2", &[ROOT_LIBRARIES, LIBRARIES]),
    ("libgcrypt20", &[LIBRARIES]),
    ("libgpg-error0", &[ROOT_LIBRARIES, LIBRARIES]),
    ("liblz4-1", &[LIBRARIES]),
    ("liblzma5", &[ROOT_LIBRARIES, LIBRARIES]),
    ("libproc2-0", &[ROOT_LIBRARIES, LIBRARIES]),
    ("libsystemd0", &[ROOT_LIBRARIES, LIBRARIES]),
    ("libzstd1", &[LIBRARIES]),
];

const NGINX: &[Package] = &[
    ("nginx", &["usr/sbin/nginx"]),
    ("libcrypt1", &[ROOT_LIBRARIES]),
    ("libpcre2-8-0", &[LIBRARIES]),
    ("libssl3", &["usr/lib/x86_64-linux-gnu/lib"]),
    ("zlib1g", &[ROOT_LIBRARIES]),
];

/// A shell that can say as whom it runs, even where that is not who started it.
const BASH: &[Package] = &[("bash", &["bin/bash"]), ("libtinfo6", &[ROOT_LIBRARIES])];

const PASSWD: &str =
    "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// Directories besides those that files bring along: path and mode.
const FOLDERS: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("mnt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var/tmp", 0o1777),
];

/// nginx with one page on one port.
const NGINX_CONFIGURATION: &str = "user root;
worker_processes 1;
pid /run/nginx.pid;
events {}
http { access_log off; server { listen PORT; root /www; } }
";
const NGINX_COMMAND: &[&str] = &["nginx", "-e", "stderr", "-g", "daemon off;"];

/// The log of a web server that is called httpd says so.
const HTTPD_COMMAND: &[&str] = &["sh", "-c", "echo httpd starts; exec httpd -f -h /www"];

/// -p: bash does not give up what the set-user-ID bit gave it.
const NO_NEW_PRIVS_COMMAND: &[&str] = &["/usr/bin/bash", "-p", "-c", "echo \"Effective uid: $EUID\""];

/// Images that are busybox and a file of the tag's name: repository, tag, file.
const MARKED: &[(&str, &str, &str)] = &[
    ("test-image-1", "latest", "test-image-1"),
    ("test-image-2", "latest", "test-image-2"),
    ("test-image-3", "latest", "test-image-3"),
    ("test-image-latest", "latest", "test-image-latest"),
    ("test-image-tag", "all", "all"),
    ("test-image-tag", "test", "test"),
    ("test-image-tags", "1", "same-image"),
    ("test-image-tags", "2", "same-image"),
    ("test-image-tags", "3", "same-image"),
];

/// Images that are busybox and a user: repository, user.
const USERS: &[(&str, &str)] = &[
    ("test-image-user-uid", "1002"),
    ("test-image-user-uid-group", "1003:1004"),
    ("test-image-user-username", "www-data"),
    ("test-image-user-username-group", "www-data:1004"),
];

/// An archive with all of them, named as the registry of the node serves them.
///
/// # Errors
/// When Debian's packages cannot be fetched or unpacked.
pub fn archive() -> Result<PathBuf> {
    // The source is the recipe.
    oci::archive(include_str!("images.rs"), make)
}

fn make(build: &Path) -> Result<Layout> {
    let everything = [BUSYBOX, TOOLS, NGINX, BASH];
    let packages = Packages::fetch(build, everything.into_iter().flatten())?;
    let mut layout = Layout::default();
    let busybox = layout.layer(&busybox(&packages, build)?)?;
    let mut layer = |wanted: &[&[Package]], files: &[(&str, String)], set_user_id: Option<&str>| {
        let mut tree = Tree::default();
        packages.unpack(wanted.iter().copied().flatten(), &mut tree)?;
        for (path, text) in files {
            tree.file(path, 0o644, text.as_str());
        }
        if let Some(path) = set_user_id {
            tree.set_user_id(path);
        }
        layout.layer(&tree)
    };
    let tools = layer(&[TOOLS], &[], None)?;
    let nginx = layer(&[NGINX], &nginx_files(80), None)?;
    let other_port = layer(&[], &nginx_files(12003), None)?;
    let page = layer(&[], &[("www/index.html", "hello\n".into())], None)?;
    let bash = layer(&[BASH], &[], Some("usr/bin/bash"))?;
    let group = layer(
        &[],
        &[
            ("etc/passwd", format!("{PASSWD}default-user:x:1000:1000::/:/bin/sh\n")),
            (
                "etc/group",
                format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
            ),
        ],
        None,
    )?;
    let mut marks = Vec::new();
    for (_, _, file) in MARKED {
        marks.push(layer(&[], &[(file, String::new())], None)?);
    }
    let shell = &["sh"];
    let mut add = |name: String, layers: &[&oci::Layer], command: &[&str], user: &str| {
        layout.image(&registry::name(&name), layers, command, user);
    };
    add(repository(PAUSE), &[&busybox], PAUSE_COMMAND, "");
    add(e2e("busybox:1.29-2"), &[&busybox, &tools], shell, "");
    add(e2e("nginx:1.14-2"), &[&busybox, &nginx], NGINX_COMMAND, "");
    add(e2e("httpd:2.4.39-4"), &[&busybox, &page], HTTPD_COMMAND, "");
    add(e2e("nonewprivs:1.3"), &[&busybox, &bash], NO_NEW_PRIVS_COMMAND, "");
    add(
        staging("hostnet-nginx-amd64:latest"),
        &[&busybox, &nginx, &other_port],
        NGINX_COMMAND,
        "",
    );
    add(
        staging("test-image-predefined-group:latest"),
        &[&busybox, &group],
        shell,
        "1000",
    );
    for ((repository, tag, _), mark) in MARKED.iter().zip(&marks) {
        add(staging(&format!("{repository}:{tag}")), &[&busybox, mark], shell, "");
    }
    for (repository, user) in USERS {
        add(staging(&format!("{repository}:latest")), &[&busybox], shell, user);
    }
    Ok(layout)
}

/// busybox under all its names, each a file of its own to whoever masks one.
fn busybox(packages: &Packages, build: &Path) -> Result<Tree> {
    let mut tree = Tree::lowest();
    for (path, mode) in FOLDERS {
        tree.folder(path, *mode, 0);
    }
    packages.unpack(BUSYBOX, &mut tree)?;
    for applet in tree.applets(build)? {
        tree.hard_link(&format!("usr/bin/{applet}"), "usr/bin/busybox");
    }
    tree.symlink("var/run", "../run");
    tree.file("etc/passwd", 0o644, PASSWD);
    tree.file("etc/group", 0o644, GROUP);
    Ok(tree)
}

fn nginx_files(port: u16) -> [(&'static str, String); 3] {
    [
        (
            "etc/nginx/nginx.conf",
            NGINX_CONFIGURATION.replace("PORT", &port.to_string()),
        ),
        // It wants the folder; the file does no harm.
        ("var/lib/nginx/README", "temporary files of nginx\n".into()),
        ("www/index.html", "hello from nginx\n".into()),
    ]
}

/// The name without its registry: what the registry of the node is asked for.
fn repository(name: &str) -> String {
    name.split_once('/').map_or(name, |(_, rest)| rest).to_owned()
}

fn e2e(image: &str) -> String {
    format!("e2e-test-images/{image}")
}

fn staging(image: &str) -> String {
    format!("k8s-staging-cri-tools/{image}")
}
