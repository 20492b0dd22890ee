#!/usr/bin/env bash
# Makes the root folder of a Debian 12 with as little in it as apt allows: what every fresh machine has, and the
# packages that are named. Prints its path. It is kept under the hash of what went in, so nobody may write to it.
# The packages come from the archives that this machine's apt knows as Debian's.
#   tests/fresh/root.sh [<package>...]
set -euo pipefail
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
suite=bookworm
# Who has a clone of the repository and types `make` in it has these.
fresh=(ca-certificates git make)
command -v mmdebstrap >/dev/null ||
  { echo "fresh: mmdebstrap is missing; deploy/deps.sh fresh installs it" >&2; exit 1; }

archives() {
  apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
    grep " $suite" || :
}
sources=$(archives)
# A machine may come without package lists.
[ -n "$sources" ] || { apt-get update >/dev/null 2>&1 || :; sources=$(archives); }
[ -n "$sources" ] || { echo "fresh: this machine's apt has no sources of Debian 12 ($suite)" >&2; exit 1; }
# How this machine's apt reaches them: proxies, what it checks.
access=$(apt-config dump | grep -E '^Acquire::(http|https|Retries|Check-|Max-|Force)' || :)

make_root() (
  set -e
  work=$1
  shift
  packages=$(printf ',%s' "${fresh[@]}" "$@")
  # What it mounts goes with it, whatever ends it. The user that apt becomes otherwise may not read this folder.
  # Half a root is thrown away, so nothing waits for the disk.
  unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
    mmdebstrap --mode=root --variant=minbase --aptopt='APT::Sandbox::User "root"' --aptopt="$work/access" \
    --dpkgopt=force-unsafe-io --include="${packages#,}" "$suite" "$work/root" - <<<"$sources"
  # No package starts anything when it is installed: there is no init, and the network is the machine's.
  printf '#!/bin/sh\nexit 101\n' >"$work/root/usr/sbin/policy-rc.d"
  chmod 755 "$work/root/usr/sbin/policy-rc.d"
  # Certificates that this machine's administrator added.
  cp -rT /usr/local/share/ca-certificates "$work/root/usr/local/share/ca-certificates"
  chroot "$work/root" update-ca-certificates
)

key=$({ printf '%s\n' "$suite" "$sources" "$access" "${fresh[@]}" "$@"; declare -f make_root; } |
  sha256sum | cut -c1-16)
out=$cache/fresh-root-$key
# It is there when it is complete, so who only uses it need not wait for whoever makes another one.
if [ ! -d "$out" ]; then
  mkdir -p "$cache"
  exec 9>"$cache/fresh-root.lock"
  flock 9
fi
if [ ! -d "$out" ]; then
  log=$cache/fresh-root.log
  work=$(mktemp -d "$cache/fresh-root.XXXXXX")
  trap 'rm -rf --one-file-system "$work"
    [ -d "$out" ] || echo "fresh: no root; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  echo "fresh: making a Debian 12 root, usually a minute or two (log: $log)" >&2
  echo "$access" >"$work/access"
  make_root "$work" "$@" >"$log" 2>&1 9>&-
  mv -T "$work/root" "$out"
fi
echo "$out"
