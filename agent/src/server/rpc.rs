//! The services `grpc.AgentService`, `grpc.Health` and `sandpod.Relay`: which call is done by whom.

use std::{future::Future, os::fd::AsFd, path::PathBuf, sync::Arc, time::Duration};

use agent_protocol::{
    oci,
    protocol::{
        agent::*,
        agent_ttrpc::{AgentService, create_agent_service},
        csi::VolumeStatsResponse,
        health::{CheckRequest, HealthCheckResponse, VersionCheckResponse, health_check_response::ServingStatus},
        health_ttrpc::{Health, create_health},
        relay::{DialRequest, DialResponse, HangUpRequest, ReceiveRequest, ReceiveResponse, SendRequest},
        relay_ttrpc::{self, create_relay},
        types,
    },
};
use async_trait::async_trait;
use protobuf::well_known_types::empty::Empty;
use tokio::{
    sync::{Notify, watch},
    task::{JoinError, JoinHandle},
};
use ttrpc::r#async::{Server, TtrpcContext};

use super::{
    container::Container,
    copy,
    error::{Doing, Error, Result},
    freezer, guest, iptables, members, metrics,
    network::Network,
    process::Process,
    relay::Relay,
    sandbox::{self, Sandbox, blocking},
    signal, stats,
    stdio::Output,
    volume,
};
use crate::engine::sys::set_window_size;

/// The version of the protocol, which upstream's health monitor compares.
const PROTOCOL_VERSION: &str = "0.0.1";

/// What the services work on.
#[derive(Debug)]
pub(super) struct Service {
    /// The pod.
    pub(super) sandbox: Sandbox,
    /// Its network.
    pub(super) network: Network,
    /// The host's connections into it.
    pub(super) relay: Relay,
    /// The guest's clock when the agent began to run.
    pub(super) began: Duration,
    /// Told when the host asks for the first time.
    pub(super) asked: Notify,
    /// True when the guest is set up.
    pub(super) ready: watch::Receiver<bool>,
}

type Context = TtrpcContext;

/// A server of all services, without a listener yet.
pub(super) fn server(service: &Arc<Service>) -> Server {
    let caller = Arc::new(Caller(Arc::clone(service)));
    Server::new()
        .register_service(create_agent_service(caller.clone()))
        .register_service(create_health(caller.clone()))
        .register_service(create_relay(caller))
}

/// Runs each call in a task of its own, so that a panic is an answer.
struct Caller(Arc<Service>);

/// A task that ends with its caller.
struct Attached<T>(JoinHandle<T>);

impl<T> Drop for Attached<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Caller {
    /// Waits until the guest is set up: nothing but [`Health`] comes before.
    async fn ready(&self) {
        self.0.asked.notify_one();
        // The other end is never dropped: PID 1 would have ended.
        let _ = self.0.ready.clone().wait_for(|ready| *ready).await;
    }

    /// To its end: a caller that gives up, or whose connection ends, leaves no half of it.
    async fn run<T, F>(&self, call: impl FnOnce(Arc<Service>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.ready().await;
        flatten(tokio::spawn(call(Arc::clone(&self.0))).await)
    }

    /// As long as the caller waits: what comes later is another's.
    async fn wait<T, F>(&self, call: impl FnOnce(Arc<Service>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.ready().await;
        let mut task = Attached(tokio::spawn(call(Arc::clone(&self.0))));
        flatten((&mut task.0).await)
    }
}

fn flatten<T>(result: std::result::Result<Result<T>, JoinError>) -> ttrpc::Result<T> {
    result
        .unwrap_or_else(|error| Err(Error::Panic(error.to_string())))
        .map_err(Into::into)
}

/// Declares a service: calls that are answered by nothing, by a message, by a message that may be long in coming, and
/// never.
macro_rules! service {
    (
        $service:path:
        acts { $($act:ident($order:ty);)* }
        answers { $($ask:ident($question:ty) -> $answer:ty;)* }
        waits { $($wait:ident($event:ty) -> $told:ty;)* }
        unimplemented { $($missing:ident($ignored:ty) -> $never:ty = $title:literal;)* }
    ) => {
        #[async_trait]
        impl $service for Caller {
            $(async fn $act(&self, _: &Context, request: $order) -> ttrpc::Result<Empty> {
                self.run(|service| async move { service.$act(request).await.map(|()| Empty::new()) }).await
            })*
            $(async fn $ask(&self, _: &Context, request: $question) -> ttrpc::Result<$answer> {
                self.run(|service| async move { service.$ask(request).await }).await
            })*
            $(async fn $wait(&self, _: &Context, request: $event) -> ttrpc::Result<$told> {
                self.wait(|service| async move { service.$wait(request).await }).await
            })*
            $(async fn $missing(&self, _: &Context, _: $ignored) -> ttrpc::Result<$never> {
                Err(Error::Unimplemented($title.into()).into())
            })*
        }
    };
}

service! {
    AgentService:
    acts {
        create_sandbox(CreateSandboxRequest);
        destroy_sandbox(DestroySandboxRequest);
        create_container(CreateContainerRequest);
        start_container(StartContainerRequest);
        remove_container(RemoveContainerRequest);
        exec_process(ExecProcessRequest);
        signal_process(SignalProcessRequest);
        update_container(UpdateContainerRequest);
        pause_container(PauseContainerRequest);
        resume_container(ResumeContainerRequest);
        close_stdin(CloseStdinRequest);
        tty_win_resize(TtyWinResizeRequest);
        add_arp_neighbors(AddARPNeighborsRequest);
        online_cpu_mem(OnlineCPUMemRequest);
        reseed_random_dev(ReseedRandomDevRequest);
        set_guest_date_time(SetGuestDateTimeRequest);
        remove_stale_virtiofs_share_mounts(RemoveStaleVirtiofsShareMountsRequest);
        copy_file(CopyFileRequest);
        update_ephemeral_mounts(UpdateEphemeralMountsRequest);
    }
    answers {
        stats_container(StatsContainerRequest) -> StatsContainerResponse;
        update_interface(UpdateInterfaceRequest) -> types::Interface;
        update_routes(UpdateRoutesRequest) -> Routes;
        list_interfaces(ListInterfacesRequest) -> Interfaces;
        list_routes(ListRoutesRequest) -> Routes;
        get_guest_details(GuestDetailsRequest) -> GuestDetailsResponse;
        get_metrics(GetMetricsRequest) -> Metrics;
        get_volume_stats(VolumeStatsRequest) -> VolumeStatsResponse;
        get_ip_tables(GetIPTablesRequest) -> GetIPTablesResponse;
        set_ip_tables(SetIPTablesRequest) -> SetIPTablesResponse;
    }
    waits {
        wait_process(WaitProcessRequest) -> WaitProcessResponse;
        write_stdin(WriteStreamRequest) -> WriteStreamResponse;
        read_stdout(ReadStreamRequest) -> ReadStreamResponse;
        read_stderr(ReadStreamRequest) -> ReadStreamResponse;
        get_oom_event(GetOOMEventRequest) -> OOMEvent;
    }
    unimplemented {
        get_diagnostic_data(GetDiagnosticDataRequest) -> GetDiagnosticDataResponse = "GetDiagnosticData";
        mem_agent_memcg_set(MemAgentMemcgConfig) -> Empty = "MemAgentMemcgSet";
        mem_agent_compact_set(MemAgentCompactConfig) -> Empty = "MemAgentCompactSet";
        mem_hotplug_by_probe(MemHotplugByProbeRequest) -> Empty = "MemHotplugByProbe";
        add_swap(AddSwapRequest) -> Empty = "AddSwap";
        add_swap_path(AddSwapPathRequest) -> Empty = "AddSwapPath";
        resize_volume(ResizeVolumeRequest) -> Empty = "ResizeVolume";
        set_policy(SetPolicyRequest) -> Empty = "SetPolicy (nothing would enforce the policy)";
    }
}

#[async_trait]
impl Health for Caller {
    async fn check(&self, _: &Context, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        self.0.asked.notify_one();
        let mut response = HealthCheckResponse::new();
        response.status = ServingStatus::SERVING.into();
        Ok(response)
    }

    async fn version(&self, _: &Context, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        let mut response = VersionCheckResponse::new();
        response.agent_version = env!("CARGO_PKG_VERSION").into();
        response.grpc_version = PROTOCOL_VERSION.into();
        Ok(response)
    }
}

service! {
    relay_ttrpc::Relay:
    acts {
        hang_up(HangUpRequest);
    }
    answers {}
    waits {
        dial(DialRequest) -> DialResponse;
        receive(ReceiveRequest) -> ReceiveResponse;
        send(SendRequest) -> Empty;
    }
    unimplemented {}
}

/// The calls, each in the words of the protocol.
impl Service {
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<()> {
        self.sandbox.create(request).await
    }

    async fn destroy_sandbox(&self, _: DestroySandboxRequest) -> Result<()> {
        self.sandbox.destroy().await
    }

    async fn create_container(&self, request: CreateContainerRequest) -> Result<()> {
        self.sandbox.create_container(request).await
    }

    async fn start_container(&self, request: StartContainerRequest) -> Result<()> {
        let container = self.sandbox.container(&request.container_id)?;
        Ok(self.sandbox.engine.start(&container.id).await?)
    }

    async fn remove_container(&self, request: RemoveContainerRequest) -> Result<()> {
        self.sandbox.remove_container(request).await
    }

    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()> {
        self.sandbox.exec(request).await
    }

    async fn signal_process(&self, request: SignalProcessRequest) -> Result<()> {
        signal::send(&self.sandbox, &request)
    }

    async fn wait_process(&self, request: WaitProcessRequest) -> Result<WaitProcessResponse> {
        let mut response = WaitProcessResponse::new();
        response.status = self.sandbox.wait(&request.container_id, &request.exec_id).await?;
        Ok(response)
    }

    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()> {
        let container = self.sandbox.container(&request.container_id)?;
        let resources = request.resources.into_option();
        let resources = resources.ok_or_else(|| Error::Invalid("UpdateContainer has no resources".into()))?;
        let resources = oci::resources_from_wire(&resources)?;
        Ok(self.sandbox.engine.update(&container.id, &resources).await?)
    }

    async fn copy_file(&self, request: CopyFileRequest) -> Result<()> {
        blocking(move || copy::copy(&request)).await
    }

    async fn pause_container(&self, request: PauseContainerRequest) -> Result<()> {
        let cgroup = self.cgroup(&request.container_id)?;
        blocking(move || freezer::set(&cgroup, true)).await
    }

    async fn resume_container(&self, request: ResumeContainerRequest) -> Result<()> {
        let cgroup = self.cgroup(&request.container_id)?;
        blocking(move || freezer::set(&cgroup, false)).await
    }

    async fn stats_container(&self, request: StatsContainerRequest) -> Result<StatsContainerResponse> {
        let cgroup = self.cgroup(&request.container_id)?;
        let mut stats = stats::of(&cgroup)?;
        if request.count_processes {
            let processes =
                members::of(&cgroup).doing(|| format!("count the processes of {:?}", request.container_id))?;
            stats.processes = u32::try_from(processes.len()).unwrap_or(u32::MAX);
        }
        Ok(stats)
    }

    async fn read_stdout(&self, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        read(&container, &request, &process, Some(&process.streams.stdout)).await
    }

    async fn read_stderr(&self, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        read(&container, &request, &process, process.streams.stderr.as_ref()).await
    }

    async fn write_stdin(&self, request: WriteStreamRequest) -> Result<WriteStreamResponse> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        let mut response = WriteStreamResponse::new();
        if request.data.is_empty() {
            process.streams.stdin.close();
            return Ok(response);
        }
        let taken = process.streams.stdin.write(&request.data, &process.exit).await?;
        let taken = taken.ok_or_else(|| container.no_process(&request.exec_id))?;
        response.len = u32::try_from(taken).unwrap_or(u32::MAX);
        Ok(response)
    }

    async fn close_stdin(&self, request: CloseStdinRequest) -> Result<()> {
        let (_, process) = self.process(&request.container_id, &request.exec_id)?;
        process.streams.stdin.close();
        Ok(())
    }

    async fn tty_win_resize(&self, request: TtyWinResizeRequest) -> Result<()> {
        let (container, process) = self.process(&request.container_id, &request.exec_id)?;
        if process.exit.now().is_some() {
            return Err(container.no_process(&request.exec_id));
        }
        let terminal = process.streams.terminal.as_ref();
        let what = || format!("process {:?} of container {:?}", request.exec_id, container.id);
        let terminal = terminal.ok_or_else(|| Error::Invalid(format!("{} has no terminal", what())))?;
        let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        set_window_size(terminal.get_ref().as_fd(), clamp(request.row), clamp(request.column))
            .doing(|| format!("resize the terminal of {}", what()))
    }

    async fn update_interface(&self, request: UpdateInterfaceRequest) -> Result<types::Interface> {
        let interface = request.interface.into_option();
        let interface = interface.ok_or_else(|| Error::Invalid("UpdateInterface has no interface".into()))?;
        self.network.update_interface(interface).await
    }

    async fn update_routes(&self, request: UpdateRoutesRequest) -> Result<Routes> {
        let refused = self.network.set_sysctls(&request.sysctls)?;
        let mut routes = request.routes.unwrap_or_default();
        routes.Routes.extend(request.further_routes);
        let mut routes = self.network.update_routes(routes).await?;
        self.network.add_rules(&request.rules).await?;
        routes.refused = refused;
        Ok(routes)
    }

    async fn list_interfaces(&self, _: ListInterfacesRequest) -> Result<Interfaces> {
        self.network.list_interfaces().await
    }

    async fn list_routes(&self, _: ListRoutesRequest) -> Result<Routes> {
        self.network.list_routes().await
    }

    async fn add_arp_neighbors(&self, request: AddARPNeighborsRequest) -> Result<()> {
        self.network.add_neighbours(request.neighbors.unwrap_or_default()).await
    }

    async fn online_cpu_mem(&self, request: OnlineCPUMemRequest) -> Result<()> {
        blocking(move || guest::online(&request)).await?;
        self.sandbox.fit_memory().await
    }

    async fn get_guest_details(&self, request: GuestDetailsRequest) -> Result<GuestDetailsResponse> {
        guest::details(&request, self.began)
    }

    async fn reseed_random_dev(&self, request: ReseedRandomDevRequest) -> Result<()> {
        guest::reseed(&request)
    }

    async fn set_guest_date_time(&self, request: SetGuestDateTimeRequest) -> Result<()> {
        guest::set_time(&request)
    }

    async fn get_oom_event(&self, _: GetOOMEventRequest) -> Result<OOMEvent> {
        let mut event = OOMEvent::new();
        event.container_id = self.sandbox.oom.next().await;
        Ok(event)
    }

    async fn get_metrics(&self, _: GetMetricsRequest) -> Result<Metrics> {
        let mut answer = Metrics::new();
        answer.metrics = blocking(metrics::text).await?;
        Ok(answer)
    }

    async fn update_ephemeral_mounts(&self, request: UpdateEphemeralMountsRequest) -> Result<()> {
        self.sandbox.update_storages(request.storages).await
    }

    async fn get_volume_stats(&self, request: VolumeStatsRequest) -> Result<VolumeStatsResponse> {
        blocking(move || volume::stats(&request.volume_guest_path)).await
    }

    async fn get_ip_tables(&self, request: GetIPTablesRequest) -> Result<GetIPTablesResponse> {
        let mut response = GetIPTablesResponse::new();
        response.data = iptables::save(&self.sandbox.reaper, request.is_ipv6).await?;
        Ok(response)
    }

    async fn set_ip_tables(&self, request: SetIPTablesRequest) -> Result<SetIPTablesResponse> {
        let mut response = SetIPTablesResponse::new();
        response.data = iptables::restore(&self.sandbox.reaper, request.is_ipv6, request.data).await?;
        Ok(response)
    }

    async fn remove_stale_virtiofs_share_mounts(&self, _: RemoveStaleVirtiofsShareMountsRequest) -> Result<()> {
        blocking(sandbox::release_stale).await
    }

    async fn dial(&self, request: DialRequest) -> Result<DialResponse> {
        let mut response = DialResponse::new();
        response.connection = self.relay.dial(request.port).await?;
        Ok(response)
    }

    async fn receive(&self, request: ReceiveRequest) -> Result<ReceiveResponse> {
        let mut response = ReceiveResponse::new();
        response.data = self.relay.receive(request.connection).await?;
        Ok(response)
    }

    async fn send(&self, request: SendRequest) -> Result<Empty> {
        self.relay.send(request.connection, &request.data).await?;
        Ok(Empty::new())
    }

    async fn hang_up(&self, request: HangUpRequest) -> Result<()> {
        self.relay.hang_up(request.connection);
        Ok(())
    }

    fn process(&self, container: &str, exec: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.sandbox.container(container)?;
        let process = container.process(exec)?;
        Ok((container, process))
    }

    fn cgroup(&self, container: &str) -> Result<PathBuf> {
        let container = self.sandbox.container(container)?;
        Ok(self.sandbox.engine.cgroup(&container.id)?)
    }
}

/// Takes output, and forgets a process that has delivered all of it and was waited for.
async fn read(
    container: &Container,
    request: &ReadStreamRequest,
    process: &Arc<Process>,
    output: Option<&Output>,
) -> Result<ReadStreamResponse> {
    let mut response = ReadStreamResponse::new();
    // A terminal has one output: the other ends before it begins.
    if let Some(output) = output {
        process.touch();
        response.data = output.read(request.len as usize, &process.exit).await?;
        process.touch();
    }
    if response.data.is_empty() && process.is_over() && !container.is_init(&request.exec_id) {
        container.forget(&request.exec_id, process);
    }
    Ok(response)
}
