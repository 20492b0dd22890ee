#!/usr/bin/env bash
# Builds our guest kernel from Debian's linux-source-6.12, kernel.config and the patches here; prints the folder that
# holds `vmlinux`, `config`, `release`, `source`, `pci` and `modules.builtin`. The folder is named by the hash of
# everything that goes in (source, compiler, options, patches and the steps below), so an unchanged recipe costs nothing
# and a changed one never passes for it.
#
# kernel.merged.config is what comes out: every option of the kernel, those too that Kconfig chose. Each run compares.
# With `tracing` first it is the kernel for eBPF agents, by kernel.tracing.config and kernel.tracing.merged.config.
#   build-kernel.sh [tracing]
#   build-kernel.sh [tracing] --prepare    only up to the first file of the kernel's own: whether all programs and
#                                          headers are there
#   build-kernel.sh [tracing] --merge      writes the merged options anew, to be looked through and committed
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
package=linux-source-6.12
tarball=/usr/src/$package.tar.xz
[ -f "$tarball" ] || { echo "build-kernel: $tarball is missing; deploy/deps.sh build installs it" >&2; exit 1; }
version=$(dpkg-query -W -f '${Version}' $package)
kind=''
if [ "${1:-}" = tracing ]; then kind=.tracing; shift; fi
merged_config=$here/kernel$kind.merged.config
# What the kernel of a kind has otherwise takes the place of what all have.
options=$(cat "$here/kernel.config" ${kind:+"$here/kernel$kind.config"} | grep '^CONFIG_' | tac | sort -t= -u -k1,1 --stable | sort)

unpack() {
  # Kconfig reads the whole tree, the compiler a small part: sources of hardware that no guest has stay packed.
  LC_ALL=C tar -C "$1" --strip-components=1 --wildcards -xf "$tarball" --exclude='*/tools/testing' --exclude='*/Documentation/*/*' \
    --exclude='*/arch/[a-tvwyz]*/*.[chS]' --exclude='*.dts*' --exclude='*/sound/*.[ch]' --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' \
    --exclude='*/drivers/net/wireless/*.[ch]' --exclude='*/drivers/infiniband/*.[ch]' --exclude='*/drivers/staging/*.[ch]' \
    --exclude='*/drivers/usb/*.[ch]'
  for patch in "$here"/*.patch; do patch -s -d "$1" -p1 <"$patch"; done
}
configure() {
  make -s allnoconfig
  echo "$options" | ./scripts/kconfig/merge_config.sh -m .config /dev/stdin >/dev/null
  make -s olddefconfig
  # An option that Kconfig drops for an unmet dependency would be a silent loss of a feature.
  while IFS='=' read -r option value; do
    case $value in
      n) ! grep -q "^$option=" .config ;;
      *) grep -qxF "$option=$value" .config ;;
    esac || { echo "Kconfig did not take $option=$value"; return 1; }
  done <<<"$options"
}
# All options of a configuration, without what tells the programs that build it apart.
merged() {
  echo "# All options of the guest's kernel, as Kconfig of $package $version makes them of kernel.config${kind:+ and kernel$kind.config}."
  sed -n 's/^# \(CONFIG_[^ ]*\) is not set$/\1=n/; /^CONFIG_/p' "$1" |
    grep -vE '^CONFIG_(AS|CC|CLANG|GCC|LD|LLD)_VERSION|^CONFIG_[A-Z_]*(PAHOLE|RUST)' | LC_ALL=C sort
}
# Kconfig of another source may choose otherwise, which is told; that of the same one may not.
compare() {
  if diff -U 0 "$merged_config" <(merged "$1") >&2; then return; fi
  if grep -qF "$package $version " "$merged_config"; then
    echo "build-kernel: these options are not those of deploy/guest/${merged_config##*/};" \
      "deploy/guest/build-kernel.sh ${kind#.} --merge writes it anew" >&2
    return 1
  fi
  echo "build-kernel: $package $version has these options otherwise than the one that ${merged_config##*/} is of" >&2
}
# The PCI devices that a kernel drives, from the drivers' tables (`struct pci_device_id`: 40 bytes, of which the first
# six words are the vendor, the device, both of the subsystem, the class and its mask), each in the form of a `modalias`
# in sysfs, with * for what may be anything.
pci_aliases() {
  local start size end
  nm -S "$1" | sed -n 's/^\([0-9a-f]*\) \([0-9a-f]*\) . __ids_pci__.*/\1 \2/p' >tables
  [ -s tables ] || { echo "the kernel has no table of PCI devices"; return 1; }
  while read -r start size; do
    printf -v end '0x%x' $((0x$start + 0x$size))
    objdump -s --start-address="0x$start" --stop-address="$end" "$1" | sed -n 's/^ [0-9a-f]\{16\} \(.\{35\}\)  .*/\1/p' |
      tr -s ' \n' '\n' | sed 's/\(..\)\(..\)\(..\)\(..\)/\U\4\3\2\1/' | paste -d ' ' - - - - - - - - - -
  done <tables | while read -r vendor device subvendor subdevice class mask _; do
    # The empty entry at the end.
    [ "$vendor$subvendor$mask" != 000000000000000000000000 ] || continue
    part() { if [ "${mask:$1:2}" = 00 ]; then echo '*'; else echo "${class:$1:2}"; fi; }
    printf 'pci:v%sd%ssv%ssd%sbc%ssc%si%s\n' "$vendor" "$device" "$subvendor" "$subdevice" "$(part 2)" "$(part 4)" "$(part 6)"
  done | sed 's/FFFFFFFF/*/g' | LC_ALL=C sort -u
}
compile() {
  make -s -j"$(nproc)" KBUILD_BUILD_TIMESTAMP=1970-01-01 KBUILD_BUILD_USER=sandpod KBUILD_BUILD_HOST=sandpod vmlinux
  mkdir out
  strip -s -o out/vmlinux vmlinux
  make -s kernelrelease >out/release
  echo "$package $version" >out/source
  pci_aliases vmlinux >out/pci
  cp modules.builtin out/modules.builtin
  cp .config out/config
  chmod 755 out
  chmod 644 out/*
}

if [ $# -gt 0 ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unpack "$work"
  cd "$work"
  configure
  case $1 in
    --prepare) make -s -j"$(nproc)" prepare ;;
    --merge) merged .config >"$merged_config" ;;
    *) echo "build-kernel: $1 is not known; --prepare and --merge are" >&2; exit 2 ;;
  esac
  exit
fi

key=$( { echo "$version" "$(gcc -dumpfullversion)" "$(ld --version | head -n 1)" "$options"; cat "$here"/*.patch
  declare -f unpack configure pci_aliases compile; } | sha256sum | cut -c1-16)
out=$cache/kernel-$key
mkdir -p "$cache"
if [ ! -f "$out/vmlinux" ]; then
  exec 9>"$cache/kernel.lock"
  flock 9
fi
# Another may have built it meanwhile.
if [ ! -f "$out/vmlinux" ]; then
  log=$cache/kernel-build.log
  work=$(mktemp -d "$cache/kernel-build.XXXXXX")
  trap 'rm -rf "$work"; [ -d "$out" ] || echo "build-kernel: failed; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  echo "kernel: building Linux $version for the guest, usually 10 minutes on two cores${kind:+, twice that with types} (log: $log)" >&2
  # A subshell, not a chain of &&: in a chain `set -e` would not hold inside the functions.
  (
    unpack "$work"
    cd "$work"
    configure
    compare .config
    compile
    mv -T out "$out"
  ) >"$log" 2>&1 9>&-
fi
compare "$out/config"
echo "$out"
