//! Which container runtime the node's kubelet uses.
//!
//! A node may run several that serve the CRI; only the kubelet's counts. Its own command line or configuration says
//! which one that is, and so does a distribution that has the kubelet inside its own program.
//!
//! The kubelet reads its configuration file and then every file that ends with `.conf` in its configuration folder and
//! below, in the order of their names; the last one that has a field wins, and the command line wins over all
//! (<https://kubernetes.io/docs/reference/node/kubelet-config-directory-merging/>).

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{
    daemon::Daemon,
    error::{InstallError, Result},
    files::{self, Host},
};

/// The kubelet's option, and that of the distributions which hand it on.
const OPTION: &str = "--container-runtime-endpoint";

/// A process of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    words: Vec<String>,
}

impl Process {
    /// The name of its program, without folders.
    fn program(&self) -> &str {
        let first = self.words.first().map(String::as_str).unwrap_or_default();
        first.rsplit('/').next().unwrap_or_default()
    }

    /// The value of an option, which may be a word of its own.
    fn option(&self, name: &str) -> Option<&str> {
        let mut words = self.words.iter();
        words
            .find_map(|word| match word.strip_prefix(name)? {
                "" => Some(None),
                rest => rest.strip_prefix('=').map(Some),
            })?
            .or_else(|| words.next().map(String::as_str))
    }

    fn has(&self, word: &str) -> bool {
        self.words
            .iter()
            .any(|found| found == word || found.strip_suffix(word).is_some_and(|rest| rest.ends_with('=')))
    }
}

/// The socket of the CRI that the node's kubelet talks to, as the node sees it; none where nothing tells.
///
/// # Errors
/// A file of the kubelet's configuration is there and no YAML.
pub fn socket(host: &Host) -> Result<Option<PathBuf>> {
    let processes = processes(host)?;
    for kubelet in processes.iter().filter(|process| process.program() == "kubelet") {
        if let Some(endpoint) = kubelet.option(OPTION) {
            return Ok(local(endpoint));
        }
        if let Some(endpoint) = configured(host, kubelet)? {
            return Ok(local(&endpoint));
        }
    }
    Ok(processes.iter().find_map(of_distribution))
}

/// Whether a process of the node was started with this file as one of its arguments.
///
/// # Errors
/// The kernel's.
pub fn is_named(host: &Host, file: &str) -> Result<bool> {
    Ok(processes(host)?.iter().any(|process| process.has(file)))
}

/// What a distribution's own program says, which has the kubelet inside.
fn of_distribution(process: &Process) -> Option<PathBuf> {
    let role = process.words.get(1).map(String::as_str);
    let is_k3s = match process.program() {
        "k3s" => matches!(role, Some("server" | "agent")),
        name => matches!(name, "k3s-server" | "k3s-agent"),
    };
    match (is_k3s, process.option(OPTION)) {
        (true, Some(endpoint)) => local(endpoint),
        (true, None) => Some(Daemon::K3s.site().socket.into()),
        (false, _) => (process.program() == "kubelite").then(|| Daemon::Microk8s.site().socket.into()),
    }
}

/// The endpoint in a kubelet's configuration, of which the last file counts that has one.
fn configured(host: &Host, kubelet: &Process) -> Result<Option<String>> {
    let mut files: Vec<_> = kubelet.option("--config").map(PathBuf::from).into_iter().collect();
    if let Some(folder) = kubelet.option("--config-dir") {
        walk(host, Path::new(folder), &mut files)?;
    }
    let mut last = None;
    for file in files {
        last = endpoint(host, &file)?.or(last);
    }
    Ok(last.filter(|endpoint| !endpoint.is_empty()))
}

/// The files that the kubelet reads in a folder, in its order.
fn walk(host: &Host, folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for name in files::names(&host.at(folder))? {
        let path = folder.join(name);
        let found = std::fs::symlink_metadata(host.at(&path));
        // As the kubelet does, a link to a folder is not followed.
        if found.is_ok_and(|found| found.is_dir()) {
            walk(host, &path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "conf") {
            files.push(path);
        }
    }
    Ok(())
}

/// The endpoint in a file of a kubelet's configuration. An empty one takes back what an earlier file has.
fn endpoint(host: &Host, file: &Path) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Kubelet {
        #[serde(rename = "containerRuntimeEndpoint")]
        endpoint: Option<String>,
    }
    let Some(text) = files::read_text(&host.at(file))? else {
        return Ok(None);
    };
    let kubelet: Kubelet = serde_saphyr::from_str(&text).map_err(|error| InstallError::ConfigInvalid {
        what: format!("the kubelet's configuration {}", file.display()),
        why: error.to_string().lines().next().unwrap_or_default().to_owned(),
    })?;
    Ok(kubelet.endpoint)
}

/// The path of a Unix socket's endpoint. `/var/run` is a link to `/run` wherever there is a kubelet.
fn local(endpoint: &str) -> Option<PathBuf> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    let path = match path.strip_prefix("/var/run/") {
        Some(rest) => format!("/run/{rest}"),
        None => path.to_owned(),
    };
    path.starts_with('/').then(|| path.into())
}

/// The processes of the node, without those of its containers: one that has a kubelet of its own, such as a cluster in
/// a pod, says nothing of the node.
fn processes(host: &Host) -> Result<Vec<Process>> {
    let folder = host.at("/proc");
    let namespace = |process: &str| std::fs::read_link(folder.join(process).join("ns/pid")).ok();
    let ours = namespace("1");
    let mut processes = Vec::new();
    for name in files::names(&folder)? {
        if !name.bytes().all(|letter| letter.is_ascii_digit()) {
            continue;
        }
        // One that has ended meanwhile has nothing to say.
        let Ok(line) = std::fs::read(folder.join(&name).join("cmdline")) else {
            continue;
        };
        if line.is_empty() || namespace(&name) != ours {
            continue;
        }
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        processes.push(Process {
            words: words.map(|word| String::from_utf8_lossy(word).into_owned()).collect(),
        });
    }
    Ok(processes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A node with these processes, and these files.
    fn node(processes: &[&str], texts: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path());
        for (number, words) in (100..).zip(processes) {
            let folder = host.at(format!("/proc/{number}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("cmdline"), words.replace(' ', "\0") + "\0").unwrap();
        }
        for (path, text) in texts {
            let path = host.at(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (root, host)
    }

    fn told(processes: &[&str], texts: &[(&str, &str)]) -> Option<String> {
        let (_root, host) = node(processes, texts);
        let socket = socket(&host).unwrap();
        socket.map(|path| path.display().to_string())
    }

    #[test]
    fn the_kubelets_own_words_count() {
        const CONFIG: &str = "/var/lib/kubelet/config.yaml";
        let config = "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: \"unix:///run/crio/crio.sock\"\n";
        for (line, text, socket) in [
            (
                "/usr/bin/kubelet --container-runtime-endpoint=unix:///var/run/containerd/containerd.sock",
                "",
                Some("/run/containerd/containerd.sock"),
            ),
            (
                "/var/lib/k0s/bin/kubelet --v=1 --container-runtime-endpoint unix:///run/k0s/containerd.sock --x",
                config,
                Some("/run/k0s/containerd.sock"),
            ),
            (
                "kubelet --config=/var/lib/kubelet/config.yaml",
                config,
                Some("/run/crio/crio.sock"),
            ),
            ("kubelet --config /var/lib/kubelet/config.yaml", "kind: X\n", None),
            ("kubelet --config /no/such/file", config, None),
            (
                "tail -f /var/log/kubelet --container-runtime-endpoint=unix:///x",
                "",
                None,
            ),
        ] {
            assert_eq!(told(&["init", line], &[(CONFIG, text)]).as_deref(), socket, "{line}");
        }
    }

    #[test]
    fn the_last_file_of_the_kubelets_folder_counts() {
        const FOLDER: &str = "/etc/kubelet.conf.d";
        /// A command line, the folder's files with their texts, and the socket.
        type Case<'t> = (&'t str, &'t [(&'t str, &'t str)], Option<&'t str>);
        let of = |socket: &str| format!("kind: KubeletConfiguration\ncontainerRuntimeEndpoint: unix:///run/{socket}\n");
        let texts = ["main", "k3s/containerd/containerd.sock", "crio/crio.sock"].map(of);
        let [main, k3s, crio] = texts.each_ref().map(String::as_str);
        let line = "kubelet --config=/main.yaml --config-dir=/etc/kubelet.conf.d --v=1";
        let cases: [Case<'_>; 9] = [
            // As RKE2 starts it.
            (
                "kubelet --config-dir=/etc/kubelet.conf.d",
                &[("00-rke2-defaults.conf", k3s)],
                Some("/run/k3s/containerd/containerd.sock"),
            ),
            (line, &[], Some("/run/main")),
            (
                line,
                &[("00.conf", k3s), ("90.conf", crio)],
                Some("/run/crio/crio.sock"),
            ),
            (line, &[("90.conf", "kind: KubeletConfiguration\n")], Some("/run/main")),
            // Names are compared within a folder, so what is in a folder comes where its name is.
            (
                line,
                &[("50/99.conf", k3s), ("60.conf", crio)],
                Some("/run/crio/crio.sock"),
            ),
            (
                line,
                &[("70/00.conf", crio), ("60.conf", k3s)],
                Some("/run/crio/crio.sock"),
            ),
            (line, &[("90.yaml", crio), ("91.conf.bak", k3s)], Some("/run/main")),
            (line, &[("90.conf", "containerRuntimeEndpoint: \"\"\n")], None),
            (
                "kubelet --config-dir /etc/kubelet.conf.d --container-runtime-endpoint=/run/line",
                &[("90.conf", crio)],
                Some("/run/line"),
            ),
        ];
        for (line, files, socket) in cases {
            let paths: Vec<_> = files.iter().map(|(name, _)| format!("{FOLDER}/{name}")).collect();
            let texts = paths.iter().zip(files).map(|(path, (_, text))| (path.as_str(), *text));
            let texts: Vec<_> = texts.chain([("/main.yaml", main)]).collect();
            assert_eq!(told(&[line], &texts).as_deref(), socket, "{line}: {files:?}");
        }
    }

    #[test]
    fn a_distribution_with_the_kubelet_inside_says_which_it_is() {
        let k3s = "/run/k3s/containerd/containerd.sock";
        assert_eq!(told(&["/usr/local/bin/k3s server"], &[]).as_deref(), Some(k3s));
        assert_eq!(told(&["/usr/local/bin/k3s agent --v 1"], &[]).as_deref(), Some(k3s));
        assert_eq!(told(&["/var/lib/k3s/bin/k3s-agent"], &[]).as_deref(), Some(k3s));
        assert_eq!(told(&["/usr/local/bin/k3s kubectl get pods"], &[]), None);
        assert_eq!(
            told(&["k3s server --container-runtime-endpoint /run/crio/crio.sock"], &[]).as_deref(),
            Some("/run/crio/crio.sock")
        );
        assert_eq!(
            told(&["/snap/microk8s/1/kubelite --kubelet-args-file=x"], &[]).as_deref(),
            Some("/var/snap/microk8s/common/run/containerd.sock")
        );
    }

    #[test]
    fn a_kubelets_file_that_cannot_be_read_is_named() {
        let (_root, host) = node(&["kubelet --config=/k.yaml"], &[("/k.yaml", "a: [\n")]);
        let error = socket(&host).unwrap_err().to_string();
        assert!(
            error.starts_with("the kubelet's configuration /k.yaml is not valid: ") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_a_process_was_started_with_is_known() {
        let (_root, host) = node(
            &["containerd -c /a/config.toml", "containerd --config=/b/config.toml"],
            &[],
        );
        for (file, named) in [
            ("/a/config.toml", true),
            ("/b/config.toml", true),
            ("/config.toml", false),
        ] {
            assert_eq!(is_named(&host, file).unwrap(), named, "{file}");
        }
    }

    #[test]
    fn a_kubelet_in_a_container_says_nothing_of_the_node() {
        let (_root, host) = node(&["kubelet --container-runtime-endpoint=/x", "sh"], &[]);
        for (process, namespace) in [("1", "pid:[1]"), ("100", "pid:[2]"), ("101", "pid:[1]")] {
            let folder = host.at(format!("/proc/{process}/ns"));
            fs::create_dir_all(&folder).unwrap();
            std::os::unix::fs::symlink(namespace, folder.join("pid")).unwrap();
        }
        assert_eq!(socket(&host).unwrap(), None);
    }
}
