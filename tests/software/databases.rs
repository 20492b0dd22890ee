//! Servers that keep data on a volume.

use tests::{
    config::Runtime,
    cri::{Access, Container},
    failure::{Failure, Result, contains, same},
    node::Node,
};

use crate::{PATIENCE, Story, at_length, empty_dir, host_path, large, software};

pub const STORIES: &[Story] = &[
    ("redis_keeps_its_data", redis_keeps_its_data),
    ("postgresql_with_a_backup_sidecar", postgresql_with_a_backup_sidecar),
];
pub const AT_LENGTH: &[Story] = &[("mariadb_recovers", mariadb_recovers)];

/// A client in another container reaches Redis by its Unix socket; what it stored is there after the server was killed,
/// and in the next pod.
fn redis_keeps_its_data(node: &Node, runtime: Runtime) -> Result {
    let data = host_path(node, "redis")?;
    let sockets = empty_dir(node, "sockets")?;
    let serve = "exec redis-server --dir /data --appendonly yes --appendfsync always \
        --unixsocket /run/redis/redis.sock --unixsocketperm 777";
    let ask = |client: &Container<'_>, question: &str| {
        client.shell(&format!("redis-cli -s /run/redis/redis.sock {question}"))
    };
    for (count, pod) in [1, 3].into_iter().zip(["redis", "next-redis"]) {
        let pod = node.pod(runtime, pod)?.run()?;
        let server = || {
            let server = software(&pod, "server", serve)?
                .volume(&data, "/data", Access::ReadWrite)
                .volume(&sockets, "/run/redis", Access::ReadWrite)
                .security("run_as_username", "redis".into())
                .run()?;
            server.wait_for_log_within("ready to accept connections at /run/redis/redis.sock", PATIENCE)?;
            Ok::<_, Failure>(server)
        };
        let first = server()?;
        let client = software(&pod, "client", "exec sleep infinity")?
            .volume(&sockets, "/run/redis", Access::ReadWrite)
            .run()?;
        same("visits", ask(&client, "incr visits")?, count.to_string())?;
        same(
            "by the pod's loopback",
            client.shell("redis-cli incr visits")?,
            (count + 1).to_string(),
        )?;
        first.kill("SIGKILL")?;
        same("the killed server's exit code", first.wait_exit()?.code, 137)?;
        first.remove()?;
        let second = server()?;
        same(
            "visits afterwards",
            ask(&client, "get visits")?,
            (count + 1).to_string(),
        )?;
        // Written by a forked child.
        same("a snapshot", ask(&client, "save")?.as_str(), "OK")?;
        second.stop(60)?;
        same("the stopped server's exit code", second.wait_exit()?.code, 0)?;
        pod.remove()?;
    }
    Ok(())
}

/// A sidecar reaches PostgreSQL by its Unix socket, dumps and restores a database, and takes a copy of all files; after
/// the server was killed, the next one recovers.
fn postgresql_with_a_backup_sidecar(node: &Node, runtime: Runtime) -> Result {
    let data = host_path(node, "postgresql")?;
    let sockets = empty_dir(node, "sockets")?;
    let backup = empty_dir(node, "backup")?;
    let serve = "set -e; PATH=$PATH:/usr/lib/postgresql/15/bin
        [ -s /data/main/PG_VERSION ] || initdb --no-instructions --pgdata /data/main
        exec postgres -D /data/main -k /run/postgresql -c listen_addresses=127.0.0.1";
    let pod = node.pod(runtime, "postgresql")?.run()?;
    let server = || {
        let server = software(&pod, "server", serve)?
            .volume(&data, "/data", Access::ReadWrite)
            .volume(&sockets, "/run/postgresql", Access::ReadWrite)
            .security("run_as_username", "postgres".into())
            .run()?;
        server.wait_for_log_within("database system is ready to accept connections", PATIENCE)?;
        Ok::<_, Failure>(server)
    };
    let first = server()?;
    let sidecar = software(&pod, "backup", "exec sleep infinity")?
        .volume(&sockets, "/run/postgresql", Access::ReadWrite)
        .volume(&backup, "/backup", Access::ReadWrite)
        .security("run_as_username", "postgres".into())
        .run()?;
    let ask = |database: &str, question: &str| {
        at_length(
            &sidecar,
            &format!("psql --no-psqlrc -qAtd {database} -c \"{question}\""),
        )
    };
    ask(
        "postgres",
        "create table sums as select n, md5(n::text) as sum from generate_series(1, 20000) n",
    )?;
    let digest = "select count(*), md5(string_agg(sum, '' order by n)) from sums";
    let before = ask("postgres", digest)?;
    let parallel = "set max_parallel_workers_per_gather = 2; set min_parallel_table_scan_size = 0;
        set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
        explain (analyze, costs off, timing off) select * from sums where sum like '%00%'";
    contains(
        "workers with shared memory",
        &ask("postgres", parallel)?,
        "Workers Launched: 2",
    )?;
    at_length(
        &sidecar,
        "pg_dump -Fc -f /backup/dump postgres; createdb restored; pg_restore -d restored /backup/dump
         pg_basebackup --no-sync -c fast -D /backup/base -X stream; /usr/lib/postgresql/15/bin/pg_verifybackup /backup/base",
    )?;
    same("restored", ask("restored", digest)?, before.as_str())?;
    first.kill("SIGKILL")?;
    same("the killed server's exit code", first.wait_exit()?.code, 137)?;
    first.remove()?;
    let second = server()?;
    contains("the log", &second.logs()?, "automatic recovery in progress")?;
    same("recovered", ask("postgres", digest)?, before.as_str())?;
    second.stop(60)?;
    same("the stopped server's exit code", second.wait_exit()?.code, 0)?;
    pod.remove()
}

/// MariaDB writes around the page cache and by asynchronous requests; what it committed is there after it was killed.
fn mariadb_recovers(node: &Node, runtime: Runtime) -> Result {
    let data = host_path(node, "mariadb")?;
    let sockets = empty_dir(node, "sockets")?;
    let serve = "set -e; [ -d /data/main/mysql ] ||
        mariadb-install-db --no-defaults --datadir=/data/main --skip-test-db --auth-root-authentication-method=normal
        exec mariadbd --no-defaults --datadir=/data/main --socket=/run/mysqld/mysqld.sock \
        --innodb-flush-method=O_DIRECT --bind-address=127.0.0.1";
    let pod = node.pod(runtime, "mariadb")?.run()?;
    let server = || {
        let server = large(&pod, "server", serve)?
            .volume(&data, "/data", Access::ReadWrite)
            .volume(&sockets, "/run/mysqld", Access::ReadWrite)
            .security("run_as_username", "mysql".into())
            .run()?;
        server.wait_for_log_within("mariadbd: ready for connections", PATIENCE)?;
        Ok::<_, Failure>(server)
    };
    let first = server()?;
    let client = large(&pod, "client", "exec sleep infinity")?
        .volume(&sockets, "/run/mysqld", Access::ReadWrite)
        .run()?;
    let ask = |question: &str| at_length(&client, &format!("mariadb --no-defaults -uroot -BNe \"{question}\""));
    ask(
        "create database shop; use shop; create table sums (n int primary key, sum char(32)) engine=innodb;
        insert into sums select seq, md5(seq) from seq_1_to_20000",
    )?;
    let digest = "set group_concat_max_len = 1000000;
        select count(*), md5(group_concat(sum order by n)) from shop.sums";
    let before = ask(digest)?;
    at_length(
        &client,
        "mariadb-dump --no-defaults -uroot shop >/tmp/dump; mariadb --no-defaults -uroot -e 'create database restored'
         mariadb --no-defaults -uroot restored </tmp/dump",
    )?;
    same("restored", ask(&digest.replace("shop", "restored"))?, before.as_str())?;
    first.kill("SIGKILL")?;
    same("the killed server's exit code", first.wait_exit()?.code, 137)?;
    first.remove()?;
    let second = server()?;
    same("recovered", ask(digest)?, before.as_str())?;
    second.stop(60)?;
    same("the stopped server's exit code", second.wait_exit()?.code, 0)?;
    pod.remove()
}
