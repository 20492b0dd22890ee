#!/usr/bin/env bash
# Makes a guest image: <out>/vmlinux, <out>/initrd (uncompressed newc: it loads faster than it would unpack) and
# <out>/manifest.json. The same inputs give the same bytes.
#   build-image.sh own <kata-agent> <out>       our kernel, everything built in
#   build-image.sh tracing <kata-agent> <out>   the same with what eBPF agents and tracers ask of a kernel
#   build-image.sh debian <kata-agent> <out>    Debian's cloud kernel and the modules that a pod needs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 3 ] || { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }
kind=$1 agent=$2 out=$3
[ -f "$agent" ] || { echo "build-image: the agent $agent does not exist; build it first" >&2; exit 1; }
if readelf -lW "$agent" | grep -q INTERP; then
  echo "build-image: $agent is linked dynamically, and the guest has no libraries" >&2
  exit 1
fi
case $kind in
  own) kernel=$("$here/build-kernel.sh") ;;
  tracing) kernel=$("$here/build-kernel.sh" tracing) ;;
  debian) kernel=$("$here/fetch-debian-kernel.sh") ;;
  *) echo "build-image: there is no guest '$kind': own, tracing or debian" >&2; exit 2 ;;
esac

# One newc entry: mode (hexadecimal), device major and minor, name, and the file that holds its contents.
inode=0
entry() {
  local mode=$1 major=$2 minor=$3 name=$4 file=${5:-/dev/null} size
  size=$(stat -L -c %s "$file")
  [ -f "$file" ] || size=0
  inode=$((inode + 1))
  printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x' \
    $inode "0x$mode" 0 0 1 0 "$size" 0 0 "$major" "$minor" $((${#name} + 1)) 0
  printf '%s\0' "$name"
  pad $((110 + ${#name} + 1))
  [ "$size" = 0 ] || { cat "$file"; pad "$size"; }
}
pad() { head -c $(((4 - $1 % 4) % 4)) /dev/zero; }
folder() { entry 41ed 0 0 "$1"; }    # drwxr-xr-x
program() { entry 81ed 0 0 "$1" "$2"; } # -rwxr-xr-x
text() { entry 81a4 0 0 "$1" "$2"; }  # -rw-r--r--

initrd() {
  folder dev
  entry 2180 5 1 dev/console # crw-------: the kernel opens it as PID 1's stdio
  entry 21b6 1 3 dev/null    # crw-rw-rw-: stands in where the console's driver is a module that PID 1 loads
  folder etc
  program init "$agent"
  if [ -d "$kernel/modules" ]; then
    text etc/modules-load.list "$kernel/modules-load.list"
    (cd "$kernel/modules" && find lib -type d -o -type f | LC_ALL=C sort) >"$new/modules"
    while read -r name; do
      if [ -d "$kernel/modules/$name" ]; then folder "$name"; else text "$name" "$kernel/modules/$name"; fi
    done <"$new/modules"
  fi
  if [ -f "$kernel/modules.builtin" ]; then
    # Which modules need not be loaded.
    for name in lib lib/modules "lib/modules/$(cat "$kernel/release")"; do folder "$name"; done
    text "lib/modules/$(cat "$kernel/release")/modules.builtin" "$kernel/modules.builtin"
  fi
  for name in proc run sys tmp; do folder $name; done
  entry 0 0 0 'TRAILER!!!'
}

sum() { sha256sum "$1" | cut -d' ' -f1; }
file_json() { printf '{ "bytes": %s, "sha256": "%s" }' "$(stat -c %s "$1")" "$(sum "$1")"; }

mkdir -p "$(dirname "$out")"
new=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$new"' EXIT
cp "$kernel/vmlinux" "$new/vmlinux"
initrd >"$new/initrd"
rm -f "$new/modules"
# The shim reads here how many processors the kernel takes and which PCI devices it drives.
cpus=$(sed -n 's/^CONFIG_NR_CPUS=//p' "$kernel/config")
[ -n "$cpus" ] && [ -s "$kernel/pci" ] || { echo "build-image: $kernel does not say what its kernel can do" >&2; exit 1; }
cat >"$new/manifest.json" <<JSON
{
  "guest": "$kind",
  "kernel": {
    "release": "$(cat "$kernel/release")", "source": "$(cat "$kernel/source")", "config_sha256": "$(sum "$kernel/config")",
    "cpus": $cpus,
    "pci": [
$(sed 's/.*/      "&"/; $!s/$/,/' "$kernel/pci")
    ]
  },
  "agent": $(file_json "$agent"),
  "vmlinux": $(file_json "$new/vmlinux"),
  "initrd": $(file_json "$new/initrd")
}
JSON
chmod 755 "$new"
chmod 644 "$new"/*
rm -rf "$out"
mv -T "$new" "$out"
