//! What a publisher publishes, as `make release` has made it: what it says of itself is so, it is signed and checked,
//! and a cluster that reaches only a registry of its own is installed from it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use tempfile::TempDir;
use tests::{
    cluster::{
        Cluster,
        operator::{INSTALLING, KATA_CONFIG_NAME},
    },
    config::REGISTRIES,
    failure::{Result, Trying, claim, contains, same},
    kubernetes,
    namespaces::Namespaces,
    node::Node,
    places,
    registry::{PORT, Registry},
    run::{self, Output, finish, succeed},
};

use crate::life::run_hello;

mod contents;

/// A story and its name.
type Story = (&'static str, fn() -> Result);

pub const STORIES: &[Story] = &[
    (
        "the_bill_of_materials_has_all_that_is_shipped",
        contents::bill_of_materials,
    ),
    ("all_that_is_shipped_has_its_licence_and_its_source", contents::licences),
    ("the_manifests_name_the_images_that_are_shipped", contents::manifests),
    ("the_same_inputs_give_the_same_bytes", contents::reproducible),
    ("a_signed_release_is_told_from_a_changed_one", signed),
    ("from_an_archive_to_a_pod", from_an_archive_to_a_pod),
];

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The registry of one's own, and the path in it. Its host is the node itself.
const HOST: &str = "registry.example.com";
const PATH: &str = "team/sandpod";

/// The folder that is packed for clusters.
fn cluster_folder(release: &Path) -> PathBuf {
    release.join(format!("sandpod-{VERSION}-cluster"))
}

/// The images and the chart that a release names: without tag, and digest.
fn digests(folder: &Path) -> Result<Vec<[String; 2]>> {
    let list = fs::read_to_string(folder.join("digests")).trying("reading the release's digests")?;
    let parsed = list.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let name = words.next()?.rsplit_once(':')?.0.to_owned();
        Some([name, words.next()?.to_owned()])
    });
    Ok(parsed.collect())
}

fn desk() -> Result<TempDir> {
    let folder = tempfile::Builder::new()
        .prefix("sandpod-release-")
        .tempdir_in("/var/tmp");
    folder.trying("making a folder for a release")
}

/// Somebody with a key, in namespaces in which GnuPG's agent ends.
struct Publisher<'n> {
    namespaces: &'n Namespaces,
    home: PathBuf,
    key: String,
}

impl<'n> Publisher<'n> {
    /// Makes a key for whoever has this address.
    fn new(namespaces: &'n Namespaces, home: PathBuf, address: &str) -> Result<Publisher<'n>> {
        fs::create_dir_all(&home).trying("making a folder for keys")?;
        let publisher = Publisher {
            namespaces,
            home,
            key: address.to_owned(),
        };
        let secret = [
            "--passphrase",
            "",
            "--quick-generate-key",
            address,
            "rsa3072",
            "sign",
            "never",
        ];
        publisher.gpg(&secret)?;
        Ok(publisher)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.namespaces.command(program);
        // GnuPG insists on a folder that only its owner reads.
        command.env("GNUPGHOME", &self.home).env("LC_ALL", "C");
        command
    }

    fn gpg(&self, words: &[&str]) -> Result<String> {
        let mut command = self.command("gpg");
        command
            .args(["--batch", "--no-permission-warning", "--pinentry-mode", "loopback"])
            .args(words);
        succeed(&mut command, run::ORDINARY).map(|output| output.errors())
    }

    /// Signs a release, with the script for it.
    fn sign(&self, release: &Path) -> Result<Output> {
        let script = places::workspace().join("deploy/release/sign.sh").display().to_string();
        finish(self.command(&script).arg(release).arg(&self.key), None, INSTALLING)
    }
}

/// A copy of the release, to be signed, or changed.
fn copy(folder: &Path) -> Result<PathBuf> {
    let copy = folder.join("release");
    succeed(
        Command::new("cp").arg("-rT").arg(places::release()?).arg(&copy),
        run::ORDINARY,
    )?;
    Ok(copy)
}

/// Changes one byte of a file, and nothing else of it.
fn change(path: &Path) -> Result {
    let mut bytes = fs::read(path).trying("reading what is to be changed")?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).trying("changing a byte")
}

/// The publisher's signature is good, a stranger's is not, and one byte makes the difference for all who check.
fn signed() -> Result {
    let folder = desk()?;
    let namespaces = Namespaces::make("", &[])?;
    let someone = |name: &str| Publisher::new(&namespaces, folder.path().join(name), &format!("{name}@example.com"));
    let (publisher, stranger) = (someone("publisher")?, someone("stranger")?);
    let release = copy(folder.path())?;
    same("the code of a signing", publisher.sign(&release)?.code, 0)?;
    let cluster = cluster_folder(&release);
    let sums = cluster.join("SHA256SUMS");
    let signature = sums.with_extension("asc");
    let verify = |who: &Publisher<'_>| {
        let mut command = who.command("gpg");
        finish(
            command.args(["--batch", "--verify"]).args([&signature, &sums]),
            None,
            run::ORDINARY,
        )
    };
    contains(
        "who checks the sums",
        &verify(&publisher)?.errors(),
        "Good signature from \"publisher@example.com\"",
    )?;
    claim(
        verify(&stranger)?.code != 0,
        "who does not know the publisher's key takes the sums",
    )?;
    let package = cluster.join(format!("sandpod-{VERSION}.tgz"));
    let strangers = folder.path().join("stranger.gpg");
    stranger.gpg(&["--output", &strangers.display().to_string(), "--export", &stranger.key])?;
    let helm = |keys: &Path| {
        let mut command = Command::new(places::peers()?.join("helm"));
        finish(
            command.args(["verify", "--keyring"]).args([keys, &package]),
            None,
            run::ORDINARY,
        )
    };
    let keys = cluster.join("key.gpg");
    contains(
        "what helm says",
        &helm(&keys)?.text(),
        "Signed by: publisher@example.com",
    )?;
    claim(
        helm(&strangers)?.code != 0,
        "helm takes another's key for the publisher's",
    )?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--extract", "--file"])
        .arg(release.join(format!("sandpod-{VERSION}-cluster.tar")));
    succeed(unpack.arg("--directory").arg(folder.path()), run::ORDINARY)?;
    let packed = cluster_folder(folder.path());
    let read = |path: PathBuf| fs::read(path).trying("reading sums");
    same("the packed sums", read(packed.join("SHA256SUMS"))?, read(sums.clone())?)?;

    change(&package)?;
    contains("what helm says", &helm(&keys)?.errors(), "sha256 sum does not match")?;
    let again = publisher.sign(&release)?;
    contains(
        "who signs what was changed",
        &again.errors(),
        "is not as make release has made it; make it again",
    )?;
    change(&packed.join("images/installer.tar"))?;
    let pushed = push(&mut Command::new("sh"), &packed)?;
    claim(pushed.code != 0, "a changed image was pushed")?;
    contains("what push.sh says", &pushed.errors(), "images/installer.tar: FAILED")?;
    contains(
        "what push.sh says",
        &pushed.errors(),
        "so nothing was pushed; unpack the archive again",
    )?;
    change(&sums)?;
    contains(
        "who checks the sums",
        &verify(&publisher)?.errors(),
        "BAD signature from \"publisher@example.com\"",
    )
}

/// Runs push.sh of an archive for the registry.
fn push(shell: &mut Command, folder: &Path) -> Result<Output> {
    let (script, registry) = (folder.join("push.sh"), format!("{HOST}:{PORT}/{PATH}"));
    finish(
        shell.arg(script).args([&registry, "--dest-tls-verify=false"]),
        None,
        INSTALLING,
    )
}

/// The archive comes to a cluster that reaches nothing but a registry of its own: images and chart are pushed there and
/// checked against the publisher's key, Helm installs from there, the node pulls from there, a pod runs, and all goes.
fn from_an_archive_to_a_pod() -> Result {
    let folder = desk()?;
    let cluster = Cluster::start()?;
    let (api, node) = (cluster.api(), cluster.node());
    cluster.allow_emulation()?;
    let publisher = Publisher::new(
        node.namespaces(),
        folder.path().join("publisher"),
        "publisher@example.com",
    )?;
    let release = copy(folder.path())?;
    let signed = publisher.sign(&release)?;
    claim(signed.code == 0, signed.errors())?;
    let archive = release.join(format!("sandpod-{VERSION}-cluster.tar"));
    succeed(
        Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(folder.path()),
        run::ORDINARY,
    )?;
    let unpacked = cluster_folder(folder.path());

    let _registry = Registry::serve(node)?;
    reach(node)?;
    let pushed = push(&mut node.command("sh"), &unpacked)?;
    claim(pushed.code == 0, pushed.errors())?;
    let registry = format!("{HOST}:{PORT}/{PATH}");
    let command =
        format!("helm install sandpod oci://{registry}/charts/sandpod --version {VERSION} --set registry={registry}");
    contains("what push.sh says", &pushed.text(), &command)?;
    only_what_is_signed(node, folder.path(), &unpacked)?;

    let helm = |program: &str, words: &[&str]| {
        let mut command = node.command(program);
        command
            .env("KUBECONFIG", api.kubeconfig_inside(kubernetes::ADMIN)?)
            .env("HOME", folder.path());
        succeed(command.args(words), INSTALLING)
    };
    helm(
        "sh",
        &[
            &unpacked.join("pushed/helm.sh").display().to_string(),
            "--plain-http",
            "--set=monitor.enabled=true",
        ],
    )?;
    cluster.explained(cluster.await_controller())?;
    cluster.create_kata_config()?;
    run_hello(&cluster, "pulled")?;
    cluster.await_kata()?;
    let images = node.ctr(["-n", "k8s.io", "images", "list", "--quiet"])?.text();
    for [name, digest] in digests(&unpacked)?.iter().filter(|[name, _]| !name.contains("charts")) {
        let name = name.replace("sandpod.io", &registry);
        contains("the node's images", &images, &format!("{name}@{digest}\n"))?;
    }
    claim(
        !images.contains("sandpod.io/"),
        format!("somebody brought images to the node: {images}"),
    )?;
    // The monitors' image is pulled from there as well.
    let namespace = "--namespace=openshift-sandboxed-containers-operator";
    cluster.explained(api.kubectl([
        "rollout",
        "status",
        "daemonset/sandpod-monitor",
        namespace,
        "--timeout=100s",
    ]))?;
    // The manifests for the registry say the same, which would change nothing now.
    for (file, images) in [
        (
            "install.yaml",
            &[
                "\"image\": \"REGISTRY/operator@sha256:",
                "\"value\": \"REGISTRY/installer@sha256:",
            ][..],
        ),
        ("monitor.yaml", &["\"image\": \"REGISTRY/installer@sha256:"]),
    ] {
        let manifest = unpacked.join("pushed").join(file).display().to_string();
        let change = api
            .kubectl(["apply", "--dry-run=server", "--filename", &manifest, "--output", "json"])?
            .text();
        for image in images {
            contains(
                &format!("the images of {file}"),
                &change,
                &image.replace("REGISTRY", &registry),
            )?;
        }
    }

    api.kubectl(["delete", "pod", "pulled"])?;
    api.kubectl(["delete", KATA_CONFIG_NAME, "--wait=false"])?;
    cluster.explained(api.wait_for("delete", &[KATA_CONFIG_NAME], INSTALLING))?;
    helm("helm", &["uninstall", "sandpod"])?;
    other_ways(node, &unpacked)?;
    let left = api.kubectl(["get", "deployments", "--all-namespaces", "--output", "name"])?;
    same("the Deployments that are left", left.text().as_str(), "")
}

/// Leads the node's programs to the registry, as an administrator does: by name, and containerd by HTTP.
fn reach(node: &Node) -> Result {
    let hosts = node.inside("/etc/hosts");
    let known = fs::read_to_string(&hosts).trying("reading the node's hosts")?;
    node.write(&hosts, &format!("{known}\n127.0.0.1 {HOST}\n"))?;
    let mirror = format!("[host.\"http://{HOST}:{PORT}\"]\ncapabilities = [\"pull\", \"resolve\"]\n");
    node.write(&node.path(&format!("{REGISTRIES}/{HOST}:{PORT}/hosts.toml")), &mirror)
}

/// The images come to the node by their own names too: by a mirror, and from the archive without any registry.
fn other_ways(node: &Node, unpacked: &Path) -> Result {
    let mirror = format!(
        "[host.\"http://{HOST}:{PORT}/v2/{PATH}\"]\ncapabilities = [\"pull\", \"resolve\"]\noverride_path = true\n"
    );
    node.write(&node.path(&format!("{REGISTRIES}/sandpod.io/hosts.toml")), &mirror)?;
    for [name, digest] in digests(unpacked)?.iter().filter(|[name, _]| !name.contains("charts")) {
        let image = format!("{name}@{digest}");
        node.crictl(["pull", &image])?;
        node.crictl(["rmi", &image])?;
        let archive = unpacked.join(format!("images/{}.tar", name.trim_start_matches("sandpod.io/")));
        let archive = archive.display().to_string();
        node.ctr(["-n", "k8s.io", "images", "import", &archive])?;
        node.ctr(["-n", "k8s.io", "images", "tag", &format!("{name}:{VERSION}"), &image])?;
        node.crictl(["inspecti", &image])?;
    }
    Ok(())
}

/// By a policy that knows the publisher's key, images and chart are taken from the registry. One that knows another
/// key takes none, and an image that somebody puts in the place of another is not taken either.
fn only_what_is_signed(node: &Node, folder: &Path, unpacked: &Path) -> Result {
    let stranger = Publisher::new(node.namespaces(), folder.join("stranger"), "stranger@example.com")?;
    let strangers = folder.join("stranger.gpg");
    stranger.gpg(&["--output", &strangers.display().to_string(), "--export", &stranger.key])?;
    let registry = format!("{HOST}:{PORT}");
    let places = folder.join("registries.d");
    let signatures = json!({ "docker": { registry.as_str(): {
        "lookaside": format!("file://{}", unpacked.join("pushed/signatures").display()),
    } } });
    node.write(&places.join("sandpod.yaml"), &signatures.to_string())?;
    let pull = |image: &str, key: &Path| {
        let rule = json!({
            "type": "signedBy", "keyType": "GPGKeys", "keyPath": key,
            // Signed was the publisher's name.
            "signedIdentity": {
                "type": "remapIdentity", "prefix": format!("{registry}/{PATH}"), "signedPrefix": "sandpod.io",
            },
        });
        let policy =
            json!({ "default": [{ "type": "reject" }], "transports": { "docker": { registry.as_str(): [rule] } } });
        let file = folder.join("policy.json");
        node.write(&file, &policy.to_string())?;
        let mut command = node.command("skopeo");
        command.arg("--policy").arg(file).arg("--registries.d").arg(&places);
        command.args([
            "copy",
            "--src-tls-verify=false",
            &format!("docker://{registry}/{PATH}/{image}"),
        ]);
        finish(
            command.arg(format!("dir:{}", folder.join("taken").display())),
            None,
            INSTALLING,
        )
    };
    let key = unpacked.join("key.gpg");
    for image in [format!("operator:{VERSION}"), format!("charts/sandpod:{VERSION}")] {
        let taken = pull(&image, &key)?;
        claim(
            taken.code == 0,
            format!("{image} is signed and not taken: {}", taken.errors()),
        )?;
        let refused = pull(&image, &strangers)?;
        claim(refused.code != 0, format!("{image} is taken, signed by whomever"))?;
        contains("what skopeo says", &refused.errors(), "Source image rejected")?;
    }
    let place = format!("docker://{registry}/{PATH}/charts/sandpod:{VERSION}-other");
    let mut replace = node.command("skopeo");
    replace.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
    replace
        .arg(format!(
            "oci-archive:{}",
            unpacked.join("images/operator.tar").display()
        ))
        .arg(place);
    succeed(&mut replace, INSTALLING)?;
    let other = pull(&format!("charts/sandpod:{VERSION}-other"), &key)?;
    claim(other.code != 0, "an image was taken for another that is signed")?;
    contains("what skopeo says", &other.errors(), "Source image rejected")
}
