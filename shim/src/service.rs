//! The task API: wire messages in, verbs of the sandbox out, and nothing else. One implementation serves
//! `containerd.task.v2` and `v3`.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status as WireStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::well_known_types::timestamp::Timestamp,
    shim_async::Task,
    ttrpc::{self, asynchronous::TtrpcContext},
};
use futures::FutureExt;
use tokio::task::JoinError;

use crate::{
    error::{Error, Result},
    io::Stdio,
    process::Status,
    sandbox::Sandbox,
};

/// Serves one sandbox.
pub struct Service {
    sandbox: Arc<Sandbox>,
}

impl Service {
    /// A service for this sandbox.
    pub fn new(sandbox: Arc<Sandbox>) -> Service {
        Service { sandbox }
    }
}

/// A point in time for the wire.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since_epoch.as_secs() as i64,
        nanos: since_epoch.subsec_nanos() as i32,
        ..Timestamp::default()
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.answer("state", async { self.state_of(&request) }).await
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        self.carry_out("create", async move |sandbox| {
            let pid = sandbox.create(request).await?;
            Ok(CreateTaskResponse {
                pid,
                ..CreateTaskResponse::default()
            })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.carry_out("start", async move |sandbox| {
            let pid = sandbox.start(&request.id, &request.exec_id).await?;
            Ok(StartResponse {
                pid,
                ..StartResponse::default()
            })
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.carry_out("delete", async move |sandbox| {
            let (pid, exit) = sandbox.delete(&request.id, &request.exec_id).await?;
            Ok(DeleteResponse {
                pid,
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..DeleteResponse::default()
            })
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.answer("pids", async {
            // The host has no numbers for the guest's processes.
            let process = ProcessInfo {
                pid: self.sandbox.pid(),
                ..ProcessInfo::default()
            };
            Ok(PidsResponse {
                processes: vec![process; self.sandbox.processes(&request.id).await?],
                ..PidsResponse::default()
            })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.carry_out("pause", async move |sandbox| {
            empty(sandbox.pause(&request.id, true).await)
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.carry_out("resume", async move |sandbox| {
            empty(sandbox.pause(&request.id, false).await)
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.answer("checkpoint", async { Err(Error::Unsupported("checkpoint")) })
            .await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.carry_out("kill", async move |sandbox| {
            let KillRequest {
                id,
                exec_id,
                signal,
                all,
                ..
            } = request;
            empty(sandbox.kill(&id, &exec_id, signal, all).await)
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.answer("exec", async {
            self.sandbox.exec(request)?;
            Ok(Empty::default())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.carry_out("resize_pty", async move |sandbox| {
            let (rows, columns) = (request.height, request.width);
            empty(sandbox.resize(&request.id, &request.exec_id, rows, columns).await)
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.answer("close_io", async {
            let process = self.sandbox.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.close_stdin.send_replace(true);
            }
            Ok(Empty::default())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.carry_out("update", async move |sandbox| {
            empty(sandbox.update(&request.id, request.resources.as_ref()).await)
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.answer("wait", async {
            let process = self.sandbox.container(&request.id)?.process(&request.exec_id)?;
            let exit = process.wait().await;
            Ok(WaitResponse {
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..WaitResponse::default()
            })
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.answer("stats", async {
            let stats = self.sandbox.stats(&request.id).await?;
            Ok(StatsResponse {
                stats: Some(stats).into(),
                ..StatsResponse::default()
            })
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.answer("connect", async {
            self.sandbox.container(&request.id)?;
            Ok(ConnectResponse {
                shim_pid: std::process::id(),
                task_pid: self.sandbox.pid(),
                version: env!("CARGO_PKG_VERSION").into(),
                ..ConnectResponse::default()
            })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.carry_out("shutdown", async move |sandbox| {
            empty(sandbox.shutdown(request.now).await)
        })
        .await
    }
}

impl Service {
    /// Carries a request that changes something out to its end, also when its caller hangs up in the middle: containerd
    /// closes a container's connection as soon as it hears of its exit.
    async fn carry_out<T, F>(&self, verb: &'static str, request: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let task = tokio::spawn(request(self.sandbox.clone()));
        let end = async {
            match task.await.map_err(JoinError::try_into_panic) {
                Ok(result) => result,
                Err(Ok(panic)) => resume_unwind(panic),
                // The shim is ending, and this answer with it.
                Err(Err(_)) => std::future::pending().await,
            }
        };
        self.answer(verb, end).await
    }

    /// Answers one request. A panic fails this request and no other: a shim that dies leaves a pod that CRI-O cannot
    /// remove.
    async fn answer<T>(&self, verb: &'static str, request: impl Future<Output = Result<T>>) -> ttrpc::Result<T> {
        let began = Instant::now();
        let outcome = AssertUnwindSafe(request).catch_unwind().await;
        self.sandbox.took(verb, began.elapsed());
        match outcome {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                tracing::info!(verb, %error, "refused");
                Err(error.into())
            }
            Err(_) => {
                tracing::error!(verb, "panicked");
                let sentence = format!("the shim failed in {verb}; its log says where");
                Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                    ttrpc::Code::INTERNAL,
                    sentence,
                )))
            }
        }
    }

    fn state_of(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.sandbox.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let Stdio {
            stdin,
            stdout,
            stderr,
            terminal,
        } = process.stdio.clone();
        let status = process.status();
        let mut response = StateResponse {
            id: container.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: self.sandbox.pid(),
            stdin,
            stdout,
            stderr,
            terminal,
            ..StateResponse::default()
        };
        response.set_status(match status {
            Status::Creating | Status::Created | Status::Starting => WireStatus::CREATED,
            Status::Running | Status::Ending => WireStatus::RUNNING,
            Status::Paused => WireStatus::PAUSED,
            Status::Stopped(_) => WireStatus::STOPPED,
        });
        if let Status::Stopped(exit) = status {
            response.exit_status = exit.status;
            response.exited_at = Some(timestamp(exit.at)).into();
        }
        Ok(response)
    }
}

fn empty(done: Result<()>) -> Result<Empty> {
    done.map(|()| Empty::default())
}
