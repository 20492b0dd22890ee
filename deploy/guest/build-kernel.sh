#!/usr/bin/env bash
# Builds our guest kernel from Debian's linux-source-6.12, kernel.config and the patches here; prints the folder that
# holds `vmlinux`, `config`, `release` and `source`. The folder is named by the hash of everything that goes in (source,
# compiler, options, patches and the steps below), so an unchanged recipe costs nothing and a changed one never passes for it.
#   build-kernel.sh
#   build-kernel.sh --prepare    only up to the first file of the kernel's own: whether all programs and headers are there
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
package=linux-source-6.12
tarball=/usr/src/$package.tar.xz
[ -f "$tarball" ] || { echo "build-kernel: $tarball is missing; deploy/deps.sh build installs it" >&2; exit 1; }
version=$(dpkg-query -W -f '${Version}' $package)
options=$(grep '^CONFIG_' "$here/kernel.config" | sort)

unpack() {
  # Kconfig reads the whole tree, the compiler a small part: sources of hardware that no guest has stay packed.
  LC_ALL=C tar -C "$1" --strip-components=1 --wildcards -xf "$tarball" --exclude='*/tools/testing' --exclude='*/Documentation/*/*' \
    --exclude='*/arch/[a-tvwyz]*/*.[chS]' --exclude='*.dts*' --exclude='*/sound/*.[ch]' --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' \
    --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]' --exclude='*/drivers/infiniband/*.[ch]' \
    --exclude='*/drivers/staging/*.[ch]' --exclude='*/drivers/usb/*.[ch]'
  for patch in "$here"/*.patch; do patch -s -d "$1" -p1 <"$patch"; done
}
configure() {
  make -s allnoconfig
  echo "$options" | ./scripts/kconfig/merge_config.sh -m .config /dev/stdin
  make -s olddefconfig
  # An option that Kconfig drops for an unmet dependency would be a silent loss of a feature.
  while IFS='=' read -r option value; do
    case $value in
      n) ! grep -q "^$option=" .config ;;
      *) grep -qxF "$option=$value" .config ;;
    esac || { echo "Kconfig did not take $option=$value"; return 1; }
  done <<<"$options"
}
compile() {
  make -s -j"$(nproc)" KBUILD_BUILD_TIMESTAMP=1970-01-01 KBUILD_BUILD_USER=sandpod KBUILD_BUILD_HOST=sandpod vmlinux
  mkdir out
  strip -s -o out/vmlinux vmlinux
  make -s kernelrelease >out/release
  echo "$package $version" >out/source
  cp .config out/config
  chmod 755 out
  chmod 644 out/*
}

if [ "${1:-}" = --prepare ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  unpack "$work"
  cd "$work"
  configure
  make -s -j"$(nproc)" prepare
  exit
fi

key=$( { echo "$version" "$(gcc -dumpfullversion)" "$(ld --version | head -n 1)" "$options"; cat "$here"/*.patch
  declare -f unpack configure compile; } | sha256sum | cut -c1-16)
out=$cache/kernel-$key
mkdir -p "$cache"
exec 9>"$cache/kernel.lock"
flock 9
if [ ! -f "$out/vmlinux" ]; then
  log=$cache/kernel-build.log
  work=$(mktemp -d "$cache/kernel-build.XXXXXX")
  trap 'rm -rf "$work"; [ -d "$out" ] || echo "build-kernel: failed; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  echo "kernel: building Linux $version for the guest, usually 8 minutes on two cores (log: $log)" >&2
  # A subshell, not a chain of &&: in a chain `set -e` would not hold inside the functions.
  (
    unpack "$work"
    cd "$work"
    configure
    compile
    mv -T out "$out"
  ) >"$log" 2>&1 9>&-
fi
echo "$out"
