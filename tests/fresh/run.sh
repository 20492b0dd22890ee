#!/usr/bin/env bash
# Runs a command in a copy of this checkout on a Debian 12 that has next to nothing installed, beside Rust and Go. Its root folder, mounts, processes and cgroups are its own and go
# when the command ends; kernel, devices and network are the machine's. What git does not know is not copied.
#   tests/fresh/run.sh [<package>...] -- <command>...     the packages are there from the start
# FRESH_CACHE=<folder> takes what is expensive from there, and leaves it there; by default nothing is there.  FRESH_KEEP=yes keeps the root folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
packages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do packages+=("$1"); shift; done
[ $# -gt 1 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
shift
[ "$(id -u)" = 0 ] || { echo "fresh: only root can give a command a root folder and devices; run it as root" >&2; exit 1; }
rust=$(rustc --print sysroot)
[ "$rust" != /usr ] || { echo "fresh: Rust is a part of this machine's /usr; install one with rustup (https://rustup.rs)" >&2; exit 1; }
root=$("$here/root.sh" "${packages[@]}")

folder=$(mktemp -d /var/tmp/sandpod-fresh-XXXXXX)
name=${folder##*/}
# Where each cgroup hierarchy is mounted.
hierarchies=$(findmnt -rn -t cgroup,cgroup2 -o TARGET | sort -u)
end() {
  trap '' INT TERM
  # With the first of its processes the kernel ends all others, and its mounts go with them.
  [ -z "${run:-}" ] || { kill -KILL "$run" 2>/dev/null || :; wait "$run" 2>/dev/null || :; }
  local hierarchy
  for hierarchy in $hierarchies; do
    [ ! -d "$hierarchy/$name" ] || find "$hierarchy/$name" -depth -type d -exec rmdir {} \; || :
  done
  if [ "${FRESH_KEEP:-}" = yes ]; then echo "fresh: kept $folder" >&2; else rm -rf --one-file-system "$folder"; fi
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p "$folder"/{changed,work,root,tmp,var-tmp,cache,home/.cargo,checkout}
chmod 1777 "$folder"/{tmp,var-tmp}
# A commit of the files as they are now; none where they are those of the last one.
commit=$(git -C "$here/../.." stash create)
git -C "$here/../.." archive --format=tar "${commit:-HEAD}" | tar -x -C "$folder/checkout"
for hierarchy in $hierarchies; do
  mkdir "$hierarchy/$name"
  # Without processors and memory of its own such a cgroup takes no process.
  for set in cpuset.cpus cpuset.mems; do [ ! -f "$hierarchy/$set" ] || cat "$hierarchy/$set" >"$hierarchy/$name/$set"; done
done

# What leads clients of packages to where this machine gets them.
variables=(HOME=/root PATH=/opt/rust/bin:/opt/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin "TERM=${TERM:-dumb}")
for variable in $(compgen -e | grep -E '^(SSL_CERT_(FILE|DIR)|CURL_CA_BUNDLE|CARGO_(HTTP|NET|REGISTR|SOURCE)[A-Z_]*|.*_(proxy|PROXY))$' || :); do
  variables+=("$variable=${!variable}")
done
for variable in GOPROXY GOSUMDB GONOSUMDB GONOPROXY GOPRIVATE GOINSECURE GOVCS; do variables+=("$variable=$(go env $variable)"); done
for file in "${CARGO_HOME:-$HOME/.cargo}"/config{,.toml}; do [ ! -f "$file" ] || cp "$file" "$folder/home/.cargo/"; done

export FOLDER=$folder ROOT=$root RUST=$rust CACHE=${FRESH_CACHE:-$folder/cache} HIERARCHIES=$hierarchies
GO=$(go env GOROOT)
export GO
# The cgroups become the root of a namespace, so the process goes there first.
setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --ipc --uts bash -euc \
  'for hierarchy in $HIERARCHIES; do echo 0 >"$hierarchy/${FOLDER##*/}/cgroup.procs"; done; exec unshare --cgroup "$@"' \
  enter "$here/inside.sh" "$@" <<<"$(printf '%s\n' "${variables[@]}")" &
run=$!
code=0
wait "$run" || code=$?
exit "$code"
