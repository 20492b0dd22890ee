//! Which handlers the running CRI serves, and whether ours are among them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    crio::{Configuration, Runtime},
    error::{InstallError, Result},
};

/// What the running CRI says of its handlers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// Their names, as its status lists them.
    Listed(BTreeSet<String>),
    /// CRI-O's, with what runs their pods, as the configuration that is in force has them.
    Configured(BTreeMap<String, Runtime>),
}

impl Served {
    /// Whether all of these handlers are served, and where that is told, by what our drop-in says.
    ///
    /// # Errors
    /// The first one that is not.
    pub fn prove(&self, cri: &'static str, handlers: &BTreeSet<String>, drop_in: &str) -> Result<()> {
        match self {
            Self::Listed(listed) => match handlers.difference(listed).next().cloned() {
                Some(handler) => Err(InstallError::HandlerAbsent { cri, handler }),
                None => Ok(()),
            },
            Self::Configured(served) => {
                let ours = Configuration::parse(drop_in).map(|ours| ours.handlers());
                let ours = ours.unwrap_or_default();
                handlers.iter().try_for_each(|handler| {
                    let handler = handler.clone();
                    match (served.get(&handler), ours.get(&handler)) {
                        (None, _) => Err(InstallError::HandlerLeftOut { cri, handler }),
                        (Some(served), Some(ours)) if served != ours => Err(InstallError::HandlerOfOthers {
                            cri,
                            handler,
                            path: served.path.clone(),
                            kind: served.kind.clone(),
                        }),
                        _ => Ok(()),
                    }
                })
            }
        }
    }

    /// Those of these handlers that are served, by whatever.
    #[must_use]
    pub fn among(&self, handlers: &BTreeSet<String>) -> BTreeSet<String> {
        let is_served = |handler: &&String| match self {
            Self::Listed(listed) => listed.contains(*handler),
            Self::Configured(served) => served.contains_key(*handler),
        };
        handlers.iter().filter(is_served).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        daemon::Daemon,
        dropin::{self, Format},
        report::Code,
    };

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Our drop-in of CRI-O with a RuntimeClass.
    fn drop_in() -> String {
        let classes = names(&["kata-large"]);
        let drop_in = dropin::handler(Daemon::Crio, Format::Crio, Path::new("/opt/sandpod"), &classes);
        drop_in.text.unwrap()
    }

    fn said(served: &Served) -> String {
        let proof = served.prove("CRI-O", &names(&["kata", "kata-large"]), &drop_in());
        proof.map_or_else(
            |error| {
                assert_eq!(error.code(), Code::HandlerAbsent);
                error.to_string()
            },
            |()| "served".into(),
        )
    }

    #[test]
    fn a_list_of_names_has_to_have_ours() {
        let listed = |all: &[&str]| Served::Listed(names(all));
        assert_eq!(said(&listed(&["", "kata", "kata-large"])), "served");
        assert_eq!(
            said(&listed(&["kata", "runc"])),
            "CRI-O runs and does not list the handler `kata-large`; its log says why"
        );
        let ours = names(&["kata", "kata-large"]);
        assert_eq!(listed(&["kata", "runc"]).among(&ours), names(&["kata"]));
    }

    #[test]
    fn a_configuration_in_force_has_to_have_ours_as_we_wrote_them() {
        let mut handlers = Configuration::parse(&drop_in()).unwrap().handlers();
        handlers.insert("runc".into(), Runtime::default());
        let served = |handlers: &BTreeMap<String, Runtime>| said(&Served::Configured(handlers.clone()));
        assert_eq!(served(&handlers), "served");
        let mut other = handlers.clone();
        other.get_mut("kata").unwrap().kind = "oci".into();
        assert_eq!(
            served(&other),
            "CRI-O runs pods of the handler `kata` by \"/opt/sandpod/current/bin/containerd-shim-kata-v2\" of the \
             `runtime_type` \"oci\", as Sandpod did not write it: another part of its configuration must say so"
        );
        handlers.remove("kata-large");
        assert_eq!(
            served(&handlers),
            "CRI-O runs and has left out the handler `kata-large`, as it does with one whose program it does not find \
             or whose keys it refuses; its log says why"
        );
        let ours = names(&["kata", "kata-large"]);
        assert_eq!(Served::Configured(handlers).among(&ours), names(&["kata"]));
    }
}
