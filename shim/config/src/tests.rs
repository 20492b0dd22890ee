use super::*;

fn annotated(config: &Config, pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let map = pairs
        .iter()
        .map(|(k, v)| (format!("io.katacontainers.config.{k}"), (*v).to_owned()))
        .collect();
    config.with_annotations(&map)
}

#[test]
fn without_a_file_our_defaults_hold() {
    let config = Config::parse("", &[]).unwrap();
    let qemu = &config.hypervisor;
    assert_eq!(qemu.path, Path::new("/usr/bin/qemu-system-x86_64"));
    assert_eq!(qemu.kernel, Path::new("/opt/sandpod/current/vmlinux"));
    assert_eq!((qemu.default_memory_mib, qemu.default_milli_vcpus), (2048, Some(1000)));
    assert_eq!((qemu.max_memory_mib, qemu.max_vcpus), (None, None));
    assert!(qemu.virtio_mem && qemu.seccomp_sandbox && qemu.vhost_net);
    assert_eq!(qemu.accelerator, Accelerator::Kvm);
    assert!(!config.runtime.disable_guest_seccomp && !config.runtime.static_sizing);
    assert_eq!(config.runtime.network, NetworkModel::TcFilter);
    assert_eq!(config.agent.create_container_timeout, Duration::from_secs(60));
    assert!(config.report.is_empty());
}

#[test]
fn katas_own_file_is_understood() {
    // The keys that kata-containers ships uncommented.
    let config = Config::parse(
        r#"
        [hypervisor.qemu]
        path = "/opt/kata/bin/qemu-system-x86_64"
        kernel = "/opt/kata/share/kata-containers/vmlinux.container"
        image = "/opt/kata/share/kata-containers/kata-containers.img"
        machine_type = "q35"
        rootfs_type = "ext4"
        enable_annotations = ["enable_iommu", "virtio_fs_extra_args", "kernel_params"]
        valid_hypervisor_paths = ["/opt/kata/bin/qemu-system-x86_64"]
        kernel_params = "cgroup_no_v1=all  systemd.unified_cgroup_hierarchy=1"
        firmware = ""
        machine_accelerators = ""
        cpu_features = "pmu=off"
        default_vcpus = 1.5
        default_maxvcpus = 0
        default_bridges = 1
        default_memory = 4096
        overhead_memory = 32
        memory_slots = 10
        default_maxmemory = 0
        disable_block_device_use = false
        shared_fs = "virtio-fs"
        virtio_fs_daemon = "/opt/kata/libexec/virtiofsd"
        valid_virtio_fs_daemon_paths = ["/opt/kata/libexec/virtiofsd"]
        virtio_fs_cache_size = 0
        virtio_fs_queue_size = 1024
        virtio_fs_extra_args = ["--thread-pool-size=1", "-o", "announce_submounts"]
        virtio_fs_cache = "never"
        block_device_driver = "virtio-scsi"
        block_device_aio = "io_uring"
        enable_iothreads = false
        enable_vhost_user_store = false
        vhost_user_store_path = "/var/run/kata-containers/vhost-user"
        valid_vhost_user_store_paths = ["/var/run/kata-containers/vhost-user"]
        disable_nesting_checks = true
        cold_plug_vfio = "no-port"
        disable_vhost_net = true
        entropy_source = "/dev/urandom"
        valid_entropy_sources = ["/dev/urandom", "/dev/random", ""]
        disable_guest_selinux = true
        [hypervisor.qemu.factory]
        enable_template = false
        [agent.kata]
        kernel_modules = ["e1000e InterruptThrottleRate=3000,3000 EEE=1", "i915"]
        dial_timeout_ms = 10
        reconnect_timeout_ms = 3000
        create_container_timeout = 60
        [agent.kata.mem_agent]
        mem_agent_enable = false
        memcg_swap = false
        [runtime]
        internetworking_model = "tcfilter"
        name = "virt_container"
        hypervisor_name = "qemu"
        agent_name = "kata"
        disable_guest_seccomp = true
        sandbox_cgroup_only = true
        static_sandbox_resource_mgmt = true
        sandbox_bind_mounts = []
        vfio_mode = "guest-kernel"
        emptydir_mode = "shared-fs"
        experimental = []
        dan_conf = "/run/kata-containers/dans"
        "#,
        &[],
    )
    .unwrap();
    let qemu = &config.hypervisor;
    assert_eq!(qemu.default_milli_vcpus, Some(1500));
    assert_eq!(
        qemu.kernel_params,
        ["cgroup_no_v1=all", "systemd.unified_cgroup_hierarchy=1"]
    );
    assert_eq!(qemu.virtio_fs_cache, Cache::Never);
    assert!(!qemu.vhost_net);
    assert_eq!(
        config.agent.kernel_modules[0].parameters,
        ["InterruptThrottleRate=3000,3000", "EEE=1"]
    );
    assert_eq!(config.agent.connect_timeout, Duration::from_secs(3));
    assert_eq!(config.agent.create_container_timeout, Duration::from_secs(60));
    assert!(config.runtime.disable_guest_seccomp && config.runtime.static_sizing);
    assert!(
        config.report.contains(
            &"`hypervisor.qemu.block_device_aio` has no effect: \
          a block volume is plugged as it is, behind a virtio-scsi controller, and no root file system is one."
                .to_owned()
        )
    );
}

#[test]
fn a_file_is_explained_by_what_it_changes() {
    let text = r#"
        [hypervisor.qemu]
        image = "/x.img"
        default_memory = 4096
        memory_slots = 10
        [agent.kata]
        reconnect_timeout_ms = 3000
        "#;
    assert_eq!(
        Config::parse(text, &[]).unwrap().explain(),
        "no configuration file: all keys have their defaults\n\
         `hypervisor.qemu.default_memory` = 4096, by default 2048\n\
         `agent.kata.reconnect_timeout_ms` = 3000, by default unset\n\
         `hypervisor.qemu.image` has no effect: the guest's root is the initrd, there is no disk image.\n"
    );
}

#[test]
fn a_guest_runs_virtual_machines_only_where_the_node_says_so() {
    let nested = |text: &str| Config::parse(text, &[]).unwrap().hypervisor.nested;
    let with = |features: &str| nested(&format!("[hypervisor.qemu]\ncpu_features = '{features}'"));
    assert!(!nested(""));
    for off in ["", "pmu=off", "pmu=off,vmx=off,svm=off"] {
        assert!(!with(off), "{off}");
    }
    for on in ["vmx=on", "pmu=off, svm=on"] {
        assert!(with(on), "{on}");
    }
}

#[test]
fn the_file_that_is_installed_says_what_holds_without_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/configuration.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let (installed, none) = (Config::parse(&text, &[]).unwrap(), Config::parse("", &[]).unwrap());
    let parts = |config: &Config| format!("{:#?}\n{:#?}\n{:#?}", config.hypervisor, config.agent, config.runtime);
    assert_eq!(parts(&installed), parts(&none));
}

/// `docs/configuration.md` is the table that the code goes by; `SANDPOD_REWRITE_GOLDEN=1` writes it anew.
#[test]
fn the_documentation_has_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (introduction, _) = text.split_once("\n| key |").unwrap();
    let wanted = format!("{introduction}\n{}", keys::table(&file::defaults()));
    if std::env::var_os("SANDPOD_REWRITE_GOLDEN").is_some() {
        return std::fs::write(&path, &wanted).unwrap();
    }
    assert!(text == wanted, "{} says something else than the code", path.display());
}

#[test]
fn a_file_we_cannot_honour_is_refused_by_the_name_of_the_key() {
    let cases = [
        (
            "[hypervisor.qemu]\ndefualt_memory = 1",
            "unknown configuration key `hypervisor.qemu.defualt_memory`; the nearest known one is `hypervisor.qemu.default_memory`",
        ),
        (
            "[hypervisor.clh]\npath = ''",
            "unknown configuration key `hypervisor.clh`",
        ),
        (
            "[runtime]\nsandbox_cgroup_only = false",
            "configuration key `runtime.sandbox_cgroup_only` = false is not supported: the shim, QEMU and virtiofsd always sit in the pod's cgroup",
        ),
        (
            "[hypervisor.qemu]\nenable_hugepages = true",
            "`hypervisor.qemu.enable_hugepages` = true",
        ),
        (
            "[hypervisor.qemu]\nenable_hugepages = 'no'",
            "`hypervisor.qemu.enable_hugepages` = \"no\"",
        ),
        ("[hypervisor.qemu]\ndefault_memory = 'lots'", "default_memory"),
        (
            "[hypervisor.qemu]\ndefault_memory = 16",
            "`hypervisor.qemu.default_memory` is 16 MiB; a guest needs 128",
        ),
        (
            "[hypervisor.qemu]\naccelerator = 'xen'",
            "`hypervisor.qemu.accelerator` is `xen`, not `kvm` or `tcg`",
        ),
        (
            "[hypervisor.qemu]\nkernel = 'vmlinux'",
            "`hypervisor.qemu.kernel` is `vmlinux`, not an absolute path",
        ),
        (
            "[hypervisor.qemu]\nvirtio_fs_extra_args = ['--sandbox=none']",
            "holds `--sandbox=none`, which is none of the arguments that may be added",
        ),
        ("[hypervisor.qemu]\nenable_annotations = ['a|b']", "holds `a|b`"),
        (
            "[hypervisor.qemu]\ncpu_features = 'pmu=off,vmx=on,avx512=off'",
            "`hypervisor.qemu.cpu_features` holds `avx512=off`; beside `pmu=off` it may hold `vmx=on` or `svm=on`",
        ),
        (
            "[runtime]\ninternetworking_model = 'macvtap'",
            "is `macvtap`; the models are `tcfilter` and `none`",
        ),
        (
            "[hypervisor.qemu]\ncold_plug_vfio = 'bridge-port'",
            "`hypervisor.qemu.cold_plug_vfio` is `bridge-port`, not `no-port` or `root-port`",
        ),
        (
            "[hypervisor.qemu]\nhot_plug_vfio = 'root-port'",
            "a device of the host is there from the VM's start, by `cold_plug_vfio`",
        ),
        (
            "[runtime]\nvfio_mode = 'vfio'",
            "`runtime.vfio_mode` = \"vfio\" is not supported: a device of the host is the guest's kernel's",
        ),
        ("[runtime\n", "is not TOML: line 1"),
    ];
    for (text, sentence) in cases {
        let error = Config::parse(text, &[]).unwrap_err().to_string();
        assert!(error.contains(sentence), "{text}: {error}");
        assert!(!error.contains('\n'), "one line: {error}");
    }
}

#[test]
fn a_drop_in_changes_one_key_and_later_names_win() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("configuration.toml");
    std::fs::write(&path, "[hypervisor.qemu]\ndefault_memory = 512\nmemory_slots = 3\n").unwrap();
    std::fs::create_dir(folder.path().join("config.d")).unwrap();
    std::fs::write(
        folder.path().join("config.d/20-b.toml"),
        "[hypervisor.qemu]\ndefault_memory = 768\n",
    )
    .unwrap();
    std::fs::write(
        folder.path().join("config.d/10-a.toml"),
        "[hypervisor.qemu]\ndefault_memory = 640\n",
    )
    .unwrap();
    std::fs::write(folder.path().join("config.d/README"), "not TOML").unwrap();
    let config = Config::load(Some(&path)).unwrap();
    assert_eq!(config.hypervisor.default_memory_mib, 768);
    assert_eq!(config.hypervisor.memory_slots, 3);
    assert_eq!(config.origin, Some(path));
}

#[test]
fn a_file_that_extends_another_is_laid_over_it_and_its_drop_ins() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let base = put(
        "configuration.toml",
        "[hypervisor.qemu]\ndefault_memory = 512\nmemory_slots = 3\n",
    );
    let drop_in = put(
        "config.d/10-a.toml",
        "[hypervisor.qemu]\ndefault_memory = 640\ndefault_vcpus = 2\n",
    );
    let text = |base: &Path| format!("extends = {base:?}\n[hypervisor.qemu]\ndefault_memory = 4096\n");
    let large = put("classes/kata-large.toml", &text(&base));
    let config = Config::load(Some(&large)).unwrap();
    let hypervisor = &config.hypervisor;
    assert_eq!((hypervisor.default_memory_mib, hypervisor.memory_slots), (4096, 3));
    assert_eq!(hypervisor.default_milli_vcpus, Some(2000));
    assert_eq!(config.files().unwrap(), [base, drop_in, large.clone()]);

    let refusal = |path: &Path| Config::load(Some(path)).unwrap_err().to_string();
    let third = put("classes/third.toml", &text(&large));
    assert_eq!(Config::load(Some(&third)).unwrap().hypervisor.memory_slots, 3);
    let fourth = put("classes/fourth.toml", &text(&third));
    assert_eq!(
        refusal(&fourth),
        format!(
            "configuration key `extends` goes on from file to file as far as {}; 3 files may be laid one over the other",
            folder.path().join("configuration.toml").display()
        )
    );
    let relative = put("classes/relative.toml", &text(Path::new("configuration.toml")));
    assert_eq!(
        refusal(&relative),
        "configuration key `extends` is \"configuration.toml\"; it has to be the absolute path of a configuration file"
    );
    let gone = put("classes/gone.toml", &text(Path::new("/nonexistent/configuration.toml")));
    assert!(refusal(&gone).starts_with("cannot read configuration /nonexistent/configuration.toml"));
}

#[test]
fn a_named_file_must_exist() {
    let error = Config::load(Some(Path::new("/nonexistent/configuration.toml"))).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read configuration /nonexistent/configuration.toml")
    );
}

#[test]
fn a_pod_may_set_what_the_node_enables() {
    let text = "[hypervisor.qemu]\nkernel_params = 'a=1'\nvirtio_fs_extra_args = ['--modcaps=+sys_admin']\n\
                enable_annotations = ['kernel_params', 'default_.*', 'virtio_fs_extra_args']";
    let config = Config::parse(text, &[]).unwrap();
    let pod = annotated(
        &config,
        &[
            ("hypervisor.default_memory", "512"),
            ("hypervisor.default_vcpus", "2.5"),
            ("hypervisor.kernel_params", "b=2"),
            ("hypervisor.virtio_fs_extra_args", "--xattr"),
            ("agent.kernel_modules", "tun; loop max_loop=4"),
        ],
    )
    .unwrap();
    assert_eq!(pod.hypervisor.default_memory_mib, 512);
    assert_eq!(pod.hypervisor.default_milli_vcpus, Some(2500));
    assert_eq!(pod.hypervisor.kernel_params, ["a=1", "b=2"]);
    assert_eq!(pod.hypervisor.virtio_fs_extra_args, ["--modcaps=+sys_admin", "--xattr"]);
    assert_eq!(pod.agent.kernel_modules[1].name, "loop");
    assert_eq!(annotated(&config, &[]).unwrap(), config);
}

#[test]
fn a_pod_is_told_which_annotation_is_refused_and_why() {
    let open = Config::parse(
        "[hypervisor.qemu]\nenable_annotations = ['.*']\nvalid_hypervisor_paths = ['/usr/bin/qemu-*']",
        &[],
    )
    .unwrap();
    let closed = Config::parse("", &[]).unwrap();
    let cases = [
        (
            &closed,
            "hypervisor.path",
            "/bin/sh",
            "`enable_annotations` of [hypervisor.qemu] does not list `path`",
        ),
        (
            &closed,
            "hypervisor.kernel_params",
            "init=/bin/sh",
            "`enable_annotations` of [hypervisor.qemu] does not list `kernel_params`",
        ),
        (
            &open,
            "hypervisor.kernel_params",
            "quiet sandpod.uid_map=0:0:1",
            "`sandpod.uid_map=0:0:1` is the shim's word to its own agent",
        ),
        (
            &open,
            "hypervisor.virtio_fs_extra_args",
            "-o source=/",
            "`source=/` is not for a pod to decide",
        ),
        (
            &open,
            "hypervisor.virtio_fs_extra_args",
            "--xattr,--modcaps=+sys_admin",
            "`--modcaps=+sys_admin` is not for a pod to decide",
        ),
        (
            &open,
            "hypervisor.path",
            "/bin/sh",
            "the node's list of valid paths does not hold this one",
        ),
        (
            &open,
            "hypervisor.path",
            "/usr/bin/qemu-/../sh",
            "the node's list of valid paths does not hold this one",
        ),
        (
            &open,
            "hypervisor.virtio_fs_daemon",
            "/bin/sh",
            "the node's list of valid paths does not hold this one",
        ),
        (&open, "hypervisor.kernel_hash", "abc", "there is no such key"),
        (
            &open,
            "hypervisor.default_memory",
            "1GiB",
            "its value `1GiB` is not a whole number",
        ),
        (
            &open,
            "hypervisor.enable_iommu",
            "true",
            "`hypervisor.qemu.enable_iommu` = true is not supported",
        ),
        (
            &open,
            "runtime.sandbox_bind_mounts",
            "/etc",
            "`runtime.sandbox_bind_mounts`",
        ),
        (
            &open,
            "runtime.disable_guest_seccomp",
            "true",
            "only the node's configuration may switch seccomp off",
        ),
        (
            &open,
            "sandbox.size",
            "1",
            "the groups are hypervisor, agent and runtime",
        ),
    ];
    for (config, key, value, sentence) in cases {
        let error = annotated(config, &[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(sentence), "{key}: {error}");
    }
    let file = HashMap::from([("io.katacontainers.config_path".to_owned(), "/tmp/mine.toml".to_owned())]);
    assert!(
        closed
            .with_annotations(&file)
            .unwrap_err()
            .to_string()
            .contains("config_path")
    );
    assert!(annotated(&open, &[("hypervisor.path", "/usr/bin/qemu-new")]).is_ok());
    assert!(
        annotated(&open, &[("hypervisor.default_max_vcpus", "4")])
            .unwrap()
            .hypervisor
            .max_vcpus
            == Some(4)
    );
}
