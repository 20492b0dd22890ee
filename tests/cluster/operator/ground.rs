//! An API server with `deploy/install.yaml` applied, for one story after another.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Node, Pod},
    events::v1::Event,
    node::v1::RuntimeClass,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use operator::api::KataConfig;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    failure::{Failure, Result, Trying},
    kubernetes::{ApiServer, Door},
    places,
};
use tokio::runtime::Runtime;

use super::rig::Rig;

/// Where the controller and the installer's pods are.
pub const NAMESPACE: &str = "openshift-sandboxed-containers-operator";
/// How long anything that needs no minutes may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Plays stories on a ground that is made when the first one needs it. One that failed leaves nothing to the next.
#[derive(Clone, Default)]
pub struct Stage(Arc<Mutex<Option<Ground>>>);

impl Stage {
    /// Plays a story.
    pub fn play(&self, tell: &fn(&mut Rig<'_>) -> Result) -> Result {
        let ground = self.ground().take();
        let ground = match ground {
            Some(ground) => ground,
            None => Ground::prepare()?,
        };
        play(&ground, tell)?;
        ground.clean()?;
        *self.ground() = Some(ground);
        Ok(())
    }

    /// Ends the API server.
    pub fn clear(&self) {
        drop(self.ground().take());
    }

    fn ground(&self) -> MutexGuard<'_, Option<Ground>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Plays a story on a ground of its own, which ends with it.
pub fn alone(tell: &fn(&mut Rig<'_>) -> Result) -> Result {
    play(&Ground::prepare()?, tell)
}

fn play(ground: &Ground, tell: &fn(&mut Rig<'_>) -> Result) -> Result {
    let mut rig = Rig::new(ground)?;
    let told = tell(&mut rig);
    if told.is_err() {
        eprintln!("{}", rig.what_was_said());
    }
    told
}

/// A running API server that knows everything of `deploy/install.yaml`.
pub struct Ground {
    pub server: ApiServer,
    pub runtime: Runtime,
    pub client: Client,
    folder: TempDir,
}

impl Ground {
    fn prepare() -> Result<Ground> {
        let server = ApiServer::start()?;
        let runtime = Runtime::new().trying("starting a runtime")?;
        let client = runtime.block_on(server.client())?;
        let folder = tempfile::Builder::new()
            .prefix("sandpod-ground-")
            .tempdir_in("/var/tmp")
            .trying("making a folder for the controller")?;
        let ground = Ground {
            server,
            runtime,
            client,
            folder,
        };
        ground.server.apply(&install()?)?;
        let crd = "crd/kataconfigs.kataconfiguration.openshift.io";
        ground.server.wait_for("condition=Established", &[crd], SOON)?;
        // A controller-manager makes these.
        for namespace in ["default", NAMESPACE] {
            let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}});
            ground.server.apply(&account.to_string())?;
        }
        ground.make_token()?;
        Ok(ground)
    }

    /// The controller's configuration: the administrator's, with a token of its own service account instead.
    fn make_token(&self) -> Result {
        let token = self.server.kubectl([
            "create",
            "token",
            "sandpod-operator",
            "--namespace",
            NAMESPACE,
            "--duration",
            "24h",
        ])?;
        let mut configuration = configuration(&self.server.kubeconfig())?;
        configuration["users"][0]["user"] = json!({"token": token.text()});
        fs::write(self.kubeconfig(), configuration.to_string()).trying("writing the controller's configuration")
    }

    /// The controller's configuration.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("controller.kubeconfig")
    }

    /// Makes a configuration of the controller that goes by another door.
    pub fn kubeconfig_by(&self, door: &Door) -> Result<PathBuf> {
        let mut configuration = configuration(&self.kubeconfig())?;
        configuration["clusters"][0]["cluster"]["server"] = json!(format!("https://127.0.0.1:{}", door.port()));
        let path = self.path("door.kubeconfig");
        fs::write(&path, configuration.to_string()).trying("writing a configuration")?;
        Ok(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Takes away everything that a story can have made.
    fn clean(&self) -> Result {
        let cleaned = self.runtime.block_on(self.sweep());
        cleaned.map_err(|error| Failure::Claim(format!("cleaning up after a story: {error}")))?;
        for entry in fs::read_dir(self.folder.path())
            .trying("listing the nodes' folders")?
            .flatten()
        {
            if entry.path().is_dir() {
                fs::remove_dir_all(entry.path()).trying("removing a node's folder")?;
            }
        }
        Ok(())
    }

    async fn sweep(&self) -> std::result::Result<(), kube::Error> {
        let at_once = DeleteParams::default().grace_period(0);
        let all = ListParams::default();
        let configs = Api::<KataConfig>::all(self.client.clone());
        for config in configs.list(&all).await? {
            let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
            ignore_absent(configs.patch(&config.name_any(), &PatchParams::default(), &free).await)?;
            ignore_absent(configs.delete(&config.name_any(), &at_once).await)?;
        }
        for pod in Api::<Pod>::all(self.client.clone()).list(&all).await? {
            let pods = Api::<Pod>::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            ignore_absent(pods.delete(&pod.name_any(), &at_once).await)?;
        }
        Api::<Node>::all(self.client.clone())
            .delete_collection(&at_once, &all)
            .await?;
        Api::<RuntimeClass>::all(self.client.clone())
            .delete_collection(&at_once, &all)
            .await?;
        Api::<Lease>::namespaced(self.client.clone(), NAMESPACE)
            .delete_collection(&at_once, &all)
            .await?;
        Api::<Event>::namespaced(self.client.clone(), "default")
            .delete_collection(&at_once, &all)
            .await?;
        Ok(())
    }
}

/// A kubeconfig.
fn configuration(path: &Path) -> Result<Value> {
    let what = || format!("the configuration {}", path.display());
    let text = fs::read_to_string(path).trying(format!("reading {}", what()))?;
    serde_json::from_str(&text).map_err(|source| Failure::Json { what: what(), source })
}

fn ignore_absent<T>(result: std::result::Result<T, kube::Error>) -> std::result::Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}

/// What an administrator applies.
pub fn install() -> Result<String> {
    let path: &Path = &places::workspace().join("deploy/install.yaml");
    fs::read_to_string(path).trying("reading deploy/install.yaml")
}
