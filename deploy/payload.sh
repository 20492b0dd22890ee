#!/usr/bin/env bash
# Makes target/payload, everything that a node needs to run pods, for sandpod-installer: our release binaries, our guest, virtiofsd, and Debian's QEMU
# with the libraries, modules and firmware that it needs, so that nothing of the node's own is used. Prints its size. The same inputs give the same bytes.
# With a second guest, its kernel is in the folder `tracing`.
#   payload.sh <programs> <guest> <virtiofsd> <out> [<guest with the kernel for tracing>]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 4 ] || [ $# = 5 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
programs=$1 guest=$2 virtiofsd=$3 out=$4 tracing=${5:-}
qemu=/usr/bin/qemu-system-x86_64 modules=/usr/lib/x86_64-linux-gnu/qemu
for file in "$programs"/{containerd-shim-kata-v2,kata-ctl} "$guest"/{vmlinux,initrd,manifest.json} "$virtiofsd" $qemu; do
  [ -f "$file" ] || { echo "payload: $file does not exist; run make build first" >&2; exit 1; }
done
for file in "$programs"/{containerd-shim-kata-v2,kata-ctl} "$virtiofsd"; do
  if readelf -lW "$file" | grep -q INTERP; then
    echo "payload: $file is linked dynamically, and a node may have other libraries" >&2
    exit 1
  fi
done
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml")

mkdir -p "$(dirname "$out")"
new=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$new"' EXIT
put() { install -D -m "$1" "$2" "$new/$3"; }
put 755 "$programs/containerd-shim-kata-v2" bin/containerd-shim-kata-v2
put 755 "$programs/kata-ctl" bin/kata-ctl
put 755 "$virtiofsd" virtiofsd
for file in vmlinux initrd manifest.json; do put 644 "$guest/$file" $file; done
[ -z "$tracing" ] || for file in vmlinux manifest.json; do put 644 "$tracing/$file" tracing/$file; done
sed "s|^path = \"$qemu\"|path = \"/opt/sandpod/current/bin/qemu-system-x86_64\"|" "$here/configuration.toml" >"$new/configuration.toml"
grep -q '^path = "/opt/sandpod/current/' "$new/configuration.toml" ||
  { echo "payload: configuration.toml does not set path = \"$qemu\" any more" >&2; exit 1; }

# QEMU looks for its modules and data beside its own program, where it was built for /usr: ../lib/x86_64-linux-gnu/qemu and ../share/qemu.
put 755 $qemu bin/qemu-system-x86_64
put 644 $modules/accel-tcg-x86_64.so lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so
# What a q35 machine without a display loads: its BIOS, and the code that starts a kernel that it is handed.
for rom in seabios/bios-256k.bin qemu/{kvmvapic,linuxboot_dma,pvh}.bin; do put 644 /usr/share/$rom "share/qemu/${rom#*/}"; done

# The libraries, under the names that programs ask for.
ldd $qemu $modules/accel-tcg-x86_64.so | sed -n 's/^.* => \(\/[^ ]*\) (.*/\1/p' | LC_ALL=C sort -u >"$new/libraries"
while read -r library; do put 644 "$library" "lib/${library##*/}"; done <"$new/libraries"
put 755 /lib64/ld-linux-x86-64.so.2 lib/ld-linux-x86-64.so.2
# A search path of the program's holds for its libraries' libraries too, unless one has its own. The installer, which
# knows where they are, names both in the place of placeholders of this length. A path relative to the program would not
# do: the loader trusts none where SELinux gives the program a domain of its own.
printf -v rest '%230s' ''
rest=${rest// /x}
patchelf --force-rpath --set-rpath "/sandpod-libraries/$rest" --set-interpreter "/sandpod-interpreter/$rest" "$new/bin/qemu-system-x86_64"
for library in "$new"/lib/*.so*; do
  if readelf -dW "$library" | grep -qE '\((RUNPATH|RPATH)\)'; then
    echo "payload: ${library##*/} has a search path of its own" >&2
    exit 1
  fi
done

# Where they come from: their sources and licences are those of the Debian packages.
mkdir -p "$new/share/doc"
# A package may name its file by the link /lib or by the folder /usr/lib.
{ cat "$new/libraries"; xargs realpath <"$new/libraries"; printf '%s\n' $qemu $modules/accel-tcg-x86_64.so /usr/share/{seabios/bios-256k,qemu/pvh}.bin; } |
  { xargs dpkg -S 2>/dev/null || :; } | sed 's/: .*//' | LC_ALL=C sort -u |
  xargs dpkg-query -W -f '${source:Package} ${source:Version} (${Package} ${Version})\n' | LC_ALL=C sort -u \
    >"$new/share/doc/debian-packages"
rm "$new/libraries"
chmod 644 "$new"/share/doc/* "$new/configuration.toml"

(cd "$new" && find . -type f ! -name MANIFEST -printf '%m %s %P\n' | LC_ALL=C sort -k3) >"$new/MANIFEST.list"
{
  echo "sandpod $version"
  while read -r mode bytes path; do
    [ "$path" = MANIFEST.list ] || echo "$mode $bytes $(sha256sum "$new/$path" | cut -d' ' -f1) $path"
  done <"$new/MANIFEST.list"
} >"$new/MANIFEST"
rm "$new/MANIFEST.list"
find "$new" -type d -exec chmod 755 {} +
chmod 644 "$new/MANIFEST"
rm -rf "$out"
mv -T "$new" "$out"
echo "payload: $out, $(du -sm --apparent-size "$out" | cut -f1) MiB in $(($(wc -l <"$out/MANIFEST") - 1)) files" >&2
