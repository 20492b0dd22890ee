#!/usr/bin/env bash
# Runs a command on a Debian 12 that has next to nothing installed, beside Rust and Go, in a copy of this checkout (of
# what git knows, as it is now). The command has a root folder, mounts, processes and cgroups of its own, which go when
# it ends; kernel, devices and network are the machine's.
#   tests/fresh/run.sh [<package>...] -- <command>...           with these packages from the start
#   tests/fresh/run.sh --here [<package>...] -- <command>...    in the checkout itself, with the machine's caches
# FRESH_CACHE=<folder>: what is expensive is there, and stays; by default nothing is there.
# FRESH_KEEP=yes: what the command changed stays, to be looked at.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=${here%/tests/fresh}
in_place='' packages=()
if [ "${1:-}" = --here ]; then in_place=yes; shift; fi
while [ $# -gt 0 ] && [ "$1" != -- ]; do packages+=("$1"); shift; done
[ $# -gt 1 ] || { sed -n '5,6s/^# *//p' "$0" >&2; exit 2; }
shift
[ "$(id -u)" = 0 ] || { echo "fresh: only root may give a command another root folder; run it as root" >&2; exit 1; }
rust=$(rustc --print sysroot)
[ "$rust" != /usr ] ||
  { echo "fresh: Rust is a part of this machine's /usr; install one with rustup (https://rustup.rs)" >&2; exit 1; }
root=$("$here/root.sh" "${packages[@]}")

# Where each cgroup hierarchy is mounted.
hierarchies=$(findmnt -rn -t cgroup,cgroup2 -o TARGET | sort -u)
# In cgroup v1 a frozen process does not even end of SIGKILL.
thaw() {
  local hierarchy frozen
  for hierarchy in $hierarchies; do
    find "$hierarchy/${folder##*/}" -name freezer.state 2>/dev/null |
      while read -r frozen; do echo THAWED >"$frozen" || :; done || :
  done
}
remove() {
  local hierarchy
  for hierarchy in $hierarchies; do
    [ ! -d "$hierarchy/${1##*/}" ] || find "$hierarchy/${1##*/}" -depth -type d -exec rmdir {} \; || :
  done
  rm -rf --one-file-system "$1"
}
# A run that was killed could not clear up; one that is alive holds its lock.
for old in /var/tmp/sandpod-fresh-*/lock; do
  [ ! -f "$old" ] || ! flock --nonblock "$old" true || remove "${old%/lock}"
done
folder=$(mktemp -d /var/tmp/sandpod-fresh-XXXXXX)
exec 9>"$folder/lock"
flock 9
end() {
  trap '' INT TERM
  local first
  if [ -n "${run:-}" ]; then
    # When the first process of a pid namespace ends, the kernel ends all others before; the mounts go with them.
    first=$(cat "/proc/$run/task/$run/children" 2>/dev/null || :)
    kill -KILL ${first:-$run} 2>/dev/null || :
    while kill -0 "$run" 2>/dev/null; do
      thaw
      sleep 0.1
    done
    wait "$run" 2>/dev/null || :
  fi
  if [ "${FRESH_KEEP:-}" = yes ]; then
    rm "$folder/lock"
    echo "fresh: kept $folder" >&2
  else
    remove "$folder"
  fi
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir "$folder"/{changed,work,root,tmp,var-tmp,cache,home,checkout,cargo}
chmod 1777 "$folder"/{tmp,var-tmp}
cargo=${CARGO_HOME:-$HOME/.cargo}
variables=(HOME=/root "TERM=${TERM:-dumb}"
  PATH=/opt/rust/bin:/opt/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin)
if [ -n "$in_place" ]; then
  where=$top cache=${SANDPOD_CACHE:-/var/cache/sandpod}
  binds=("$top=$top" "$cache=$cache" "$cargo=$cargo")
  variables+=("CARGO_HOME=$cargo")
  for variable in $(compgen -e | grep -E '^(SANDPOD|FRESH)_' || :); do variables+=("$variable=${!variable}"); done
else
  where=/root/sandpod
  # A commit of the files as they are; none where they are those of the last one.
  commit=$(git -C "$top" stash create)
  git -C "$top" archive --format=tar "${commit:-HEAD}" | tar -x -C "$folder/checkout"
  for file in "$cargo"/config{,.toml}; do [ ! -f "$file" ] || cp "$file" "$folder/cargo/"; done
  binds=("$folder/checkout=$where" "${FRESH_CACHE:-$folder/cache}=/var/cache/sandpod" "$folder/cargo=/root/.cargo")
fi
# What leads clients of packages to where this machine gets them.
for variable in $(compgen -e |
  grep -E '^(SSL_CERT_(FILE|DIR)|CURL_CA_BUNDLE|CARGO_(HTTP|NET|REGISTR|SOURCE)[A-Z_]*|.*_(proxy|PROXY))$' || :); do
  variables+=("$variable=${!variable}")
done
for variable in GOPROXY GOSUMDB GONOSUMDB GONOPROXY GOPRIVATE GOINSECURE GOVCS; do
  variables+=("$variable=$(go env $variable)")
done
for hierarchy in $hierarchies; do
  mkdir "$hierarchy/${folder##*/}"
  # A cgroup without processors or memory takes no process.
  for set in cpuset.cpus cpuset.mems; do
    [ ! -f "$hierarchy/$set" ] || cat "$hierarchy/$set" >"$hierarchy/${folder##*/}/$set"
  done
done

export FOLDER=$folder ROOT=$root WHERE=$where HIERARCHIES=$hierarchies
# Containers' root folders are overlays, and such cannot be on one, as the root is: what grows is in folders of the
# machine's own file system.
BINDS=$(printf '%s\n' "$folder/tmp=/tmp" "$folder/var-tmp=/var/tmp" "$folder/home=/root" "${binds[@]}")
TOOLS=$(printf '%s\n' "$rust=/opt/rust" "$(go env GOROOT)=/opt/go")
export BINDS TOOLS
# The cgroups become the root of a namespace of their own, so the process goes there first.
setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --ipc --uts \
  bash -euc 'for hierarchy in $HIERARCHIES; do echo 0 >"$hierarchy/${FOLDER##*/}/cgroup.procs"; done
    exec unshare --cgroup "$@"' enter "$here/inside.sh" "$@" <<<"$(printf '%s\n' "${variables[@]}")" 9>&- &
run=$!
code=0
wait "$run" || code=$?
exit "$code"
