#!/usr/bin/env bash
# Makes the disk of an emulated node: Debian with systemd, its own kernel, and the containerd of the tests as a service.
# Prints the folder with root.img, vmlinuz, initrd.img, and below qemu/ the QEMU that runs the node, with its libraries.
# What is made is kept under the hash of its inputs.
#   tests/node/image.sh <folder with containerd, its runc shim, ctr and crictl>
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
peers=$1
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
programs=(containerd containerd-shim-runc-v2 ctr crictl)
for program in "${programs[@]}"; do
  [ -x "$peers/$program" ] || { echo "node image: $peers/$program does not exist; run make peers first" >&2; exit 1; }
done

# The last line is what stories and the tests' programs ask of a node, the others make it one.
packages=(
  systemd systemd-sysv dbus udev kmod procps zstd
  linux-image-amd64 initramfs-tools lz4 apparmor
  runc containernetworking-plugins iptables iproute2
  qemu-system-x86 busybox-static attr e2fsprogs secilc policycoreutils
)
# The QEMU of Debian 12 (7.2) emulates AMD's virtualization with faults: one guest in twenty dies, or a processor of the
# node misses an interrupt for ever. The backports of Debian 13 have a later one.
qemu() {
  # mmdebstrap has written the line of Debian 13 by then.
  local backports="sed -n 's/ trixie main/ trixie-backports main/p;T;q' \"\$1/etc/apt/sources.list\""
  mmdebstrap --quiet --mode=root --variant=extract --include=qemu-system-x86 \
    --aptopt='APT::Sandbox::User "root"' --aptopt='APT::Default-Release "trixie-backports"' \
    --setup-hook="$backports >\"\$1/etc/apt/sources.list.d/backports.list\"" \
    trixie "$1"
  rm -rf "${1:?}"/usr/share/{doc,man,locale} "${1:?}"/var
}

# What stands on a virtual disk: the initrd needs no more.
drivers='virtio_pci\nvirtio_blk\next4\n'

# For a boot with SELinux: its policy, and a label for each file. Without SELinux they are as good as not there.
selinux() {
  local policy=/etc/selinux/node
  { printf '(category c%d)\n' {0..1023}; printf '(categoryorder (%s))\n' "$(printf 'c%d ' {0..1023})"; } \
    >"$1$policy/categories.cil"
  mkdir "$1$policy/policy"
  chroot "$1" sh -c "cd $policy && secilc --policyvers=33 --output=policy/policy.33 --filecontext=/tmp/unused *.cil"
  rm "$1/tmp/unused"
  # It names files by /proc/self/fd.
  unshare --mount sh -c 'mount -t proc proc "$1/proc" && chroot "$1" setfiles -F "$2" /' \
    sh "$1" $policy/contexts/files/file_contexts
}

files=$(cd "$here/image" && find . -type f | LC_ALL=C sort)
key=$({
  cat "$0"
  (cd "$here/image" && xargs sha256sum <<<"$files")
  (cd "$peers" && sha256sum "${programs[@]}")
} | sha256sum | cut -c1-16)
out=$cache/node-$key
mkdir -p "$cache"
exec 9>"$cache/node.lock"
flock 9
if [ -f "$out/root.img" ]; then echo "$out"; exit; fi

echo 'node image: Debian with systemd for an emulated node, usually 4 minutes' >&2
build=$(mktemp -d "$cache/building-node.XXXXXX")
failed() {
  cp "$build/log" "$cache/node-image.log"
  echo "node image: failed; $cache/node-image.log ends with: $(tail -n 3 "$build/log")" >&2
  rm -rf "$build"
}
trap failed EXIT
(
  # The folder is root's alone, so apt's own user cannot fetch into it; nothing else than the harness trusts what is made.
  mmdebstrap --quiet --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
    --aptopt='APT::Sandbox::User "root"' --dpkgopt=force-unsafe-io --dpkgopt=force-confold \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --setup-hook="copy-in '$here/image/etc' /" \
    --setup-hook="printf '$drivers' >\"\$1/etc/initramfs-tools/modules\"" \
    bookworm "$build/root"
  root=$build/root
  install -t "$root/usr/local/bin" "${programs[@]/#/$peers/}"
  # The first boot is like every other one.
  echo 5a6d706f644e6f646554657374000001 >"$root/etc/machine-id"
  echo node >"$root/etc/hostname"
  printf '127.0.0.1 localhost node\n' >"$root/etc/hosts"
  mkdir -p "$root/etc/containerd/conf.d"
  chroot "$root" systemctl --quiet enable containerd node-runner
  chroot "$root" systemctl --quiet mask getty@tty1 serial-getty@ttyS0 apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-tmpfiles-clean.timer
  selinux "$root"
  cp -L "$root/vmlinuz" "$root/initrd.img" "$build/"
  rm -rf "${root:?}"/boot/* "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin
  truncate -s 12G "$build/root.img"
  mke2fs -q -t ext4 -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$build/root.img"
  rm -rf "$root"
  qemu "$build/qemu"
) >"$build/log" 2>&1 </dev/null
trap - EXIT
chmod 755 "$build"
mv -T "$build" "$out"
echo "$out"
