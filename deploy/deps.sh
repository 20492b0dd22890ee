#!/usr/bin/env bash
# Installs the Debian packages that building and running Sandpod needs, by group; quiet and quick when all are there.
#   deploy/deps.sh build|kernel|tracing|run|payload|images|release|test|fresh|peers ...
#   deploy/deps.sh --list <group>...     only prints their names, one per line
# build: our programs, virtiofsd and the guest image.  kernel: our own guest kernel.  tracing: the one for eBPF agents.
# run: pods.  payload: what a node gets.  images: container images.  release: what is published, and its signatures.
# test: what only tests use.  fresh: a Debian root folder, to try these lists in.  peers: nothing but Go, which builds
# the real programs that tests run against.
set -euo pipefail
build=(gcc libc6-dev make pkg-config libseccomp-dev libcap-ng-dev libelf-dev binutils kmod lz4 xz-utils zstd)
kernel=(linux-source-6.12 flex bison bc libelf-dev patch xz-utils)
tracing=(dwarves)
run=(qemu-system-x86 containerd runc containernetworking-plugins iproute2 iptables)
payload=(qemu-system-x86 patchelf binutils)
images=(buildah binutils jq)
release=(gpg gpg-agent jq skopeo)
test=(attr busybox-static chromium curl e2fsprogs etcd-server openssl procps qemu-utils shellcheck w3m)
fresh=(mmdebstrap)

only_list=''
if [ "${1:-}" = --list ]; then only_list=yes; shift; fi
packages=() tools=()
for group; do
  case $group in
    build) packages+=("${build[@]}") tools+=(cargo) ;;
    kernel) packages+=("${kernel[@]}") ;;
    tracing) packages+=("${tracing[@]}") ;;
    run) packages+=("${run[@]}") ;;
    payload) packages+=("${payload[@]}") ;;
    images) packages+=("${images[@]}") ;;
    release) packages+=("${release[@]}") tools+=(cargo) ;;
    test) packages+=("${test[@]}") ;;
    fresh) packages+=("${fresh[@]}") ;;
    peers) tools+=(go) ;;
    *)
      echo "deps: there is no group '$group':" \
        "build, kernel, tracing, run, payload, images, release, test, fresh or peers" >&2
      exit 2
      ;;
  esac
done
if [ -n "$only_list" ]; then printf '%s\n' "${packages[@]}" | LC_ALL=C sort -u; exit; fi

missing=()
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null | sed -n 's/^installed //p' || true)
for package in "${packages[@]}"; do grep -qxF "$package" <<<"$installed" || missing+=("$package"); done
if [ ${#missing[@]} -gt 0 ]; then
  apt=(apt-get -o DPkg::Lock::Timeout=300)
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "deps: install these packages as root: ${missing[*]}" >&2; exit 1; }
    apt=(sudo "${apt[@]}")
  fi
  echo "deps: installing ${missing[*]}, usually a minute" >&2
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null ||
    { echo "deps: apt failed: $(grep '^E:' "$log" | head -n 3)" >&2; exit 1; }
fi
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null && continue
  case $tool in
    cargo) echo "deps: Rust's cargo is missing; install it with rustup (https://rustup.rs)" >&2 ;;
    go) echo "deps: the go command is missing; install Go 1.26 or later (https://go.dev/dl)" >&2 ;;
  esac
  exit 1
done
