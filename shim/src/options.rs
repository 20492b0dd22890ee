//! What a caller says beside the command line: the message on the standard input of `start`, and the options of Create.
//!
//! containerd 2.3+ sends a `BootstrapParams`, older ones the runtime options as an `Any`, CRI-O nothing. A
//! `BootstrapParams` also parses as an `Any` and the other way round (both begin with two strings), so the
//! message is recognised by the id and the namespace that the command line repeats.

use std::path::PathBuf;

use containerd_shim_protos::{
    bootstrap_api::BootstrapParams,
    protobuf::{self, CodedInputStream, Message, well_known_types::any::Any},
};

use crate::{
    cli::Cli,
    error::{Error, Result, decode},
};

/// Type of the options table of a CRI runtime handler, in every containerd and in CRI-O.
const OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";

/// The event socket of the containerd that runs this shim; `None` under CRI-O, which has no event service.
pub fn event_address(cli: &Cli, stdin: &[u8], environment: Option<String>) -> Option<String> {
    let bootstrap = BootstrapParams::parse_from_bytes(stdin)
        .ok()
        .filter(|params| params.instance_id == cli.id && params.namespace == cli.namespace)
        .map(|params| params.containerd_ttrpc_address);
    bootstrap.or(environment).filter(|address| !address.is_empty())
}

/// The configuration file that the runtime handler names; `None` when it names none.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(None);
    };
    let type_name = options.type_url.rsplit('/').next().unwrap_or_default();
    if type_name != OPTIONS_TYPE {
        return Err(Error::Invalid(format!(
            "the runtime options are of type {type_name}; this runtime takes {OPTIONS_TYPE}"
        )));
    }
    let mut path = String::new();
    let mut body = Vec::new();
    let mut input = CodedInputStream::from_bytes(&options.value);
    let mut fields = |input: &mut CodedInputStream<'_>| -> protobuf::Result<()> {
        // containerd's runtimeoptions.v1.Options: 1 type_url, 2 config_path, 3 config_body.
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                18 => path = input.read_string()?,
                26 => body = input.read_bytes()?,
                other => protobuf::rt::skip_field_for_tag(other, input)?,
            }
        }
        Ok(())
    };
    fields(&mut input).map_err(decode("the runtime options"))?;
    if path.is_empty() && !body.is_empty() {
        return Err(Error::Invalid(
            "the runtime handler's options carry a table instead of ConfigPath; put the keys into a configuration.toml and name it by ConfigPath".into(),
        ));
    }
    Ok((!path.is_empty()).then(|| path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::CodedOutputStream;

    fn cli() -> Cli {
        Cli::parse("-namespace k8s.io -id abc start".split(' ').map(str::to_owned)).unwrap()
    }

    fn options(path: &str, body: &str) -> Any {
        let mut value = Vec::new();
        let mut out = CodedOutputStream::vec(&mut value);
        out.write_string(1, "ignored").unwrap();
        if !path.is_empty() {
            out.write_string(2, path).unwrap();
        }
        out.write_string(3, body).unwrap();
        out.flush().unwrap();
        drop(out);
        Any {
            type_url: OPTIONS_TYPE.into(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn bootstrap_params_name_the_event_socket_and_old_daemons_use_the_environment() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            ..Default::default()
        };
        let stdin = params.write_to_bytes().unwrap();
        assert_eq!(
            event_address(&cli(), &stdin, Some("/old".into())),
            Some("/run/c.ttrpc".into())
        );
        let legacy = options("/etc/c.toml", "").write_to_bytes().unwrap();
        assert_eq!(event_address(&cli(), &legacy, Some("/old".into())), Some("/old".into()));
        assert_eq!(event_address(&cli(), &[], Some(String::new())), None, "CRI-O");
    }

    #[test]
    fn the_handler_names_a_configuration_file_or_none() {
        assert_eq!(
            config_path(Some(&options("/etc/c.toml", ""))).unwrap(),
            Some("/etc/c.toml".into())
        );
        assert_eq!(config_path(None).unwrap(), None);
        assert_eq!(config_path(Some(&Any::new())).unwrap(), None);
        assert!(
            config_path(Some(&options("", "[x]")))
                .unwrap_err()
                .to_string()
                .contains("ConfigPath")
        );
        let runc = Any {
            type_url: "containerd.runc.v1.Options".into(),
            ..Default::default()
        };
        assert!(
            config_path(Some(&runc))
                .unwrap_err()
                .to_string()
                .contains("containerd.runc.v1.Options")
        );
    }
}
