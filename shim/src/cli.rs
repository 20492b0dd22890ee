//! The shim's command line: Go-style single-dash flags, as containerd and CRI-O pass them.

use std::path::PathBuf;

/// What the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Find or make the sandbox's shim and print its address.
    Start,
    /// Remove what a dead shim left.
    Delete,
    /// Be the shim of one sandbox; standard input is the listening socket. Internal: only `start` asks for it.
    Serve,
    /// Remove what dead shims have left on the node. Internal: only `start` asks for it.
    Sweep,
    /// Print the version.
    Version,
    /// Print the OCI features document (CRI-O).
    Features,
    /// Print a `containerd.types.RuntimeInfo` message (containerd 2).
    Info,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cli {
    /// What to do.
    pub action: Action,
    /// `-namespace`: containerd's namespace, or `default` under CRI-O.
    pub namespace: String,
    /// `-id`: the container's id.
    pub id: String,
    /// `-address`: containerd's gRPC socket; empty under CRI-O.
    pub address: String,
    /// `-bundle`: the bundle's path (`delete` only; otherwise the working directory is the bundle).
    pub bundle: Option<PathBuf>,
    /// `-debug`: more log.
    pub debug: bool,
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CliError {
    /// An unknown word.
    #[error("unknown argument '{0}'; the actions are start, delete, features, -info and --version")]
    Unknown(String),
    /// A flag without its value.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// `start` or `delete` without an id.
    #[error("flag -id is missing or is not a name (letters, digits, '.', '_' and '-', at most 128)")]
    Id,
}

impl Cli {
    /// Parses the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Cli, CliError> {
        let mut cli = Cli {
            action: Action::Serve,
            namespace: "default".into(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let mut action = None;
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                action = Some(match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "features" => Action::Features,
                    "serve" => Action::Serve,
                    "sweep" => Action::Sweep,
                    _ => return Err(CliError::Unknown(arg)),
                });
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                "debug" => cli.debug = inline.as_deref() != Some("false"),
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" => {
                    let value = inline
                        .or_else(|| args.next())
                        .ok_or_else(|| CliError::NoValue(name.into()))?;
                    match name {
                        "namespace" => cli.namespace = value,
                        "id" => cli.id = value,
                        "address" => cli.address = value,
                        "bundle" if !value.is_empty() => cli.bundle = Some(value.into()),
                        _ => {}
                    }
                }
                _ => return Err(CliError::Unknown(arg)),
            }
        }
        cli.action = action.ok_or_else(|| CliError::Unknown(String::new()))?;
        let named = matches!(
            cli.action,
            Action::Start | Action::Delete | Action::Serve | Action::Sweep
        );
        if named && !is_name(&cli.id) {
            return Err(CliError::Id);
        }
        Ok(cli)
    }
}

/// Ids become directory names on the host and in the guest, so nothing but plain names is taken.
pub fn is_name(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, CliError> {
        Cli::parse(
            line.split(' ')
                .map(|word| if word == "''" { String::new() } else { word.to_owned() }),
        )
    }

    #[test]
    fn crio_starts_a_container_with_empty_addresses() {
        let cli = parse("-namespace default -address '' -publish-binary /usr/bin/crio -id abc -debug start").unwrap();
        assert_eq!(
            (cli.action, cli.id.as_str(), cli.address.as_str(), cli.debug),
            (Action::Start, "abc", "", true)
        );
    }

    #[test]
    fn containerd_deletes_with_a_bundle() {
        let cli = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -bundle /b delete",
        )
        .unwrap();
        assert_eq!((cli.action, cli.bundle), (Action::Delete, Some("/b".into())));
    }

    #[test]
    fn version_features_and_info_need_no_id() {
        for (line, action) in [
            ("--version", Action::Version),
            ("-v", Action::Version),
            ("features", Action::Features),
            ("-info", Action::Info),
        ] {
            assert_eq!(parse(line).unwrap().action, action);
        }
    }

    #[test]
    fn an_id_that_would_leave_its_directory_is_refused() {
        for id in ["../x", "..", "a/b", ""] {
            assert_eq!(
                Cli::parse(["-id".to_owned(), id.to_owned(), "start".to_owned()]),
                Err(CliError::Id)
            );
        }
        assert_eq!(parse("-id"), Err(CliError::NoValue("id".into())));
        assert_eq!(parse("-frob"), Err(CliError::Unknown("-frob".into())));
    }
}
