//! The harness's own ground: an API server that stands alone.

use std::{fs, time::Duration};

use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use tests::{
    failure::{Failure, Result, Trying, claim, same},
    kubernetes::ApiServer,
};

/// A story and its name.
type Story = (&'static str, fn() -> Result);

pub const STORIES: &[Story] = &[("serves_kubectl_and_clients_and_leaves_nothing", serves)];

fn serves() -> Result {
    let server = ApiServer::start()?;
    let kubeconfig = server.kubeconfig();
    let version = server.json(["version"])?;
    same(
        "the server's version",
        version["serverVersion"]["gitVersion"].as_str(),
        Some("v1.36.3"),
    )?;
    server.apply(r#"{ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "made-by-kubectl" } }"#)?;
    server.wait_for(
        "jsonpath={.status.phase}=Active",
        &["namespace/made-by-kubectl"],
        Duration::from_secs(10),
    )?;
    let names = tokio::runtime::Runtime::new()
        .trying("starting a runtime")?
        .block_on(async {
            let namespaces = Api::<Namespace>::all(server.client().await?)
                .list(&Default::default())
                .await;
            let list = namespaces.map_err(|error| Failure::Claim(format!("listing namespaces: {error}")))?;
            Ok::<_, Failure>(
                list.items
                    .into_iter()
                    .filter_map(|each| each.metadata.name)
                    .collect::<Vec<_>>(),
            )
        })?;
    claim(
        names.iter().any(|name| name == "made-by-kubectl"),
        format!("the client sees only {names:?}"),
    )?;
    let refused = server.kubectl(["--token", "of-nobody", "get", "nodes"]);
    claim(refused.is_err(), "somebody without a token may list nodes")?;
    drop(server);
    claim(fs::metadata(kubeconfig).is_err(), "the server's folder is still there")
}
