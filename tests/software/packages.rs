//! Programs that install and fetch programs.

use tests::{
    config::Runtime,
    cri::Access,
    failure::{Result, contains, same},
    node::Node,
    run,
};

use crate::{
    PATIENCE, Story, at_length, empty_dir,
    image::{MIRROR, MIRRORED},
    large, software,
};

pub const STORIES: &[Story] = &[("git_clones_and_pushes", git_clones_and_pushes)];

pub const AT_LENGTH: &[Story] = &[
    ("apt_installs_ten_packages", apt_installs_ten_packages),
    ("npm_installs_from_a_registry", npm_installs_from_a_registry),
];

/// apt installs ten packages from a mirror in the other container; programs with capabilities keep them and have them
/// for users without.
fn apt_installs_ten_packages(node: &Node, runtime: Runtime) -> Result {
    let pod = node.pod(runtime, "apt")?.run()?;
    software(&pod, "mirror", &format!("exec busybox httpd -f -p 8080 -h {MIRROR}"))?.run()?;
    let debian = software(&pod, "debian", "exec sleep infinity")?.run()?;
    let names = MIRRORED.join(" ");
    at_length(
        &debian,
        &format!(
            "echo 'deb [trusted=yes] http://127.0.0.1:8080 ./' >/etc/apt/sources.list
             apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install --yes {names}
             dpkg --verify {names}"
        ),
    )?;
    let installed = debian.shell(&format!(
        "dpkg-query -W -f '${{db:Status-Status}}\\n' {names} | sort | uniq -c"
    ))?;
    same("installed", installed.trim(), "10 installed")?;
    same(
        "capabilities",
        debian.shell("getcap /usr/bin/ping /usr/bin/mtr-packet")?.as_str(),
        "/usr/bin/ping cap_net_raw=ep\n/usr/bin/mtr-packet cap_net_raw=ep",
    )?;
    let nobody = "setpriv --reuid nobody --regid nogroup --clear-groups";
    contains(
        "ping as nobody",
        &at_length(&debian, &format!("{nobody} ping -c 1 -W 60 127.0.0.1"))?,
        "1 received",
    )?;
    contains(
        "mtr as nobody",
        &at_length(
            &debian,
            &format!("{nobody} mtr --report --report-cycles 1 --no-dns 127.0.0.1"),
        )?,
        "127.0.0.1",
    )?;
    // A raw socket is what no setting gives to everybody.
    debian.shell("cp /usr/bin/python3 /usr/bin/capable && setcap cap_net_raw+ep /usr/bin/capable")?;
    let raw = |program: &str| {
        let open = format!("{nobody} {program} -c 'import socket; socket.socket(type=socket.SOCK_RAW, proto=1)'");
        debian.exec(&["sh", "-c", &open], None, run::ORDINARY)
    };
    same("with its capability", raw("capable")?.code, 0)?;
    contains("without", &raw("python3")?.errors(), "Operation not permitted")?;
    pod.remove()
}

/// git clones onto a volume from a daemon in the other container, and pushes back what it changed.
fn git_clones_and_pushes(node: &Node, runtime: Runtime) -> Result {
    let work = empty_dir(node, "work")?;
    let pod = node.pod(runtime, "git")?.run()?;
    let serve = "set -e; export HOME=/root; git config --global user.email a@git.test; git config --global user.name A
        git init -q --bare -b main /srv/git/project.git; git clone -q /srv/git/project.git /tmp/first 2>/dev/null
        cd /tmp/first; mkdir files; seq 1 300 | while read n; do echo $n >files/$n; done; ln -s files/1 link
        git add .; git commit -qm first; git push -q origin HEAD:main
        exec git daemon --verbose --export-all --enable=receive-pack --base-path=/srv/git";
    let server = software(&pod, "server", serve)?.run()?;
    server.wait_for_log_within("Ready to rumble", PATIENCE)?;
    let client = software(&pod, "client", "exec sleep infinity")?
        .volume(&work, "/work", Access::ReadWrite)
        .run()?;
    let change = "cd /work; git clone -q git://127.0.0.1/project.git; cd project; cat link; ls files | wc -l
        git config user.email b@git.test; git config user.name B
        echo changed >files/1; git mv files/2 files/second; git commit -qam second; git push -q
        git gc -q; git fsck --strict; git status --short";
    same("the clone", at_length(&client, change)?.as_str(), "1\n300")?;
    let log = "git -C /srv/git/project.git log --format=%s main; git -C /srv/git/project.git show main:files/1";
    same("the server's", server.shell(log)?.as_str(), "second\nfirst\nchanged")?;
    pod.remove()
}

/// A registry of two packages, with programs, many files and something to do when they are installed.
const REGISTRY: &str = r#"const { execFileSync } = require('child_process'), fs = require('fs'), http = require('http')
const packages = {
  left: { bin: { left: 'index.js' }, dependencies: { right: '^1.0.0' } },
  right: { scripts: { postinstall: 'echo yes >built' } },
}
const known = {}
for (const [name, more] of Object.entries(packages)) {
  const folder = `/tmp/${name}`, manifest = { name, version: '1.0.0', ...more }
  fs.mkdirSync(`${folder}/lib`, { recursive: true })
  fs.writeFileSync(`${folder}/package.json`, JSON.stringify(manifest))
  fs.writeFileSync(`${folder}/index.js`, `#!/usr/bin/env node\nconsole.log('${name}', require('right/lib/499'))\n`)
  for (let i = 0; i < 500; i++) fs.writeFileSync(`${folder}/lib/${i}.js`, `module.exports = ${i}\n`)
  const [{ filename, integrity }] = JSON.parse(execFileSync('npm', ['pack', '--json'], { cwd: folder }))
  const dist = { integrity, tarball: `http://127.0.0.1:4873/${name}/-/${filename}` }
  known[name] = { name, 'dist-tags': { latest: '1.0.0' }, versions: { '1.0.0': { ...manifest, dist } } }
}
http.createServer((request, response) => {
  const [, name, , file] = request.url.split('/')
  response.end(file ? fs.readFileSync(`/tmp/${name}/${file}`) : JSON.stringify(known[name]))
}).listen(4873, '127.0.0.1', () => console.log('the registry listens'))
"#;

/// npm installs a package and what it depends on onto a volume, from a registry in the other container.
fn npm_installs_from_a_registry(node: &Node, runtime: Runtime) -> Result {
    let settings = node.path(&format!("registry-{}", node.serial()));
    node.write(&settings.join("registry.js"), REGISTRY)?;
    let work = empty_dir(node, "work")?;
    let pod = node.pod(runtime, "npm")?.run()?;
    let registry = large(&pod, "registry", "exec node /settings/registry.js")?
        .volume(&settings, "/settings", Access::ReadOnly)
        .run()?;
    registry.wait_for_log_within("the registry listens", PATIENCE)?;
    let client = large(&pod, "client", "exec sleep infinity")?
        .volume(&work, "/work", Access::ReadWrite)
        .run()?;
    let npm = "npm --registry http://127.0.0.1:4873 --no-audit --no-fund --no-update-notifier";
    at_length(&client, &format!("cd /work; npm init --yes; {npm} install left"))?;
    let run = "cd /work; node_modules/.bin/left; cat node_modules/right/built";
    same("the program", client.shell(run)?.as_str(), "left 499\nyes")?;
    at_length(&client, &format!("cd /work; {npm} ci"))?;
    same("the program again", client.shell(run)?.as_str(), "left 499\nyes")?;
    pod.remove()
}
