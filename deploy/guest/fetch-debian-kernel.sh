#!/usr/bin/env bash
# Fetches Debian's prebuilt cloud kernel and prints a folder shaped as build-kernel.sh's: `vmlinux`, `config`, `release`,
# `source`, `pci`, and `modules/` with `modules-load.list`. apt checks the package against Debian's signatures; nothing
# is installed.
set -euo pipefail
cache=${SANDPOD_CACHE:-/var/cache/sandpod}

# Loaded at boot, by the agent, in this order (each after what it depends on).
boot=(virtio_pci virtio_console virtio-rng virtio_net virtiofs overlay virtio_mem virtio_balloon vmw_vsock_virtio_transport)
# In the image for whoever asks for them later: what pods use of the network and of disks.
later=(
  nf_tables nft_compat nft_chain_nat nft_ct nft_masq nft_nat nft_redir nft_reject_inet nft_limit nft_log nft_fib_inet nft_hash
  iptable_filter iptable_nat iptable_mangle iptable_raw ip6table_filter ip6table_nat ip6table_mangle ip6table_raw ipt_REJECT ip6t_REJECT
  xt_MASQUERADE xt_REDIRECT xt_TCPMSS xt_addrtype xt_comment xt_connmark xt_conntrack xt_limit xt_mark xt_multiport xt_nat
  xt_owner xt_state xt_statistic xt_tcpudp
  bridge br_netfilter dummy tun veth loop virtio_blk virtio_scsi sd_mod
)

meta=linux-image-cloud-amd64
newest() { apt-cache depends $meta 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' || :; }
package=$(newest)
# A machine may come without package lists.
[ -n "$package" ] || { apt-get update >/dev/null 2>&1 || :; package=$(newest); }
[ -n "$package" ] || { echo "fetch-debian-kernel: apt knows no $meta; this needs Debian, and its package lists (apt-get update)" >&2; exit 1; }
version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')
release=${package#linux-image-}

# The setup header (Documentation/arch/x86/boot.rst) says where the compressed kernel begins and how long it is.
extract_vmlinux() {
  local image=$1 start length
  le() { od -A n -t "u$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
  [ "$(dd if="$image" bs=1 skip=$((0x202)) count=4 status=none)" = HdrS ] || { echo "$image is no bzImage"; return 1; }
  start=$((($(le $((0x1f1)) 1) + 1) * 512 + $(le $((0x248)) 4)))
  length=$(le $((0x24c)) 4)
  payload() { dd if="$image" iflag=skip_bytes,count_bytes skip="$start" count="$1" bs=64K status=none; }
  # All but gzip, which has its own, end with four bytes that hold the unpacked size.
  case $(payload 4 | od -A n -t x1 | tr -d ' ') in
    1f8b*) payload "$length" | gzip -dc ;;
    fd377a58) payload $((length - 4)) | xz -dc ;;
    28b52ffd) payload $((length - 4)) | zstd -dcq ;;
    02214c18) payload $((length - 4)) | lz4 -dcq ;;
    *) echo "the compression of $image is unknown"; return 1 ;;
  esac
}

# Prints a module's file after the files it depends on.
with_dependencies() {
  local file dependency
  file=$(find "package/lib/modules/$release" -name "$1.ko" -o -name "${1//_/-}.ko" -o -name "${1//-/_}.ko")
  if [ -z "$file" ]; then
    grep -qE "/${1//[_-]/[_-]}\.ko$" "package/lib/modules/$release/modules.builtin" && return
    echo "the kernel has no module $1" >&2
    return 1
  fi
  for dependency in $(modinfo -F depends "$file" | tr , ' '); do with_dependencies "$dependency"; done
  echo "${file#package/}"
}
pick() { for module; do with_dependencies "$module"; done | awk '!seen[$0]++'; }

fetch() {
  # Lists older than the archive name a version that is no longer there.
  apt-get -o APT::Sandbox::User=root download "$package=$version" ||
    { apt-get update && apt-get -o APT::Sandbox::User=root download "$package"; }
  dpkg-deb -x ./*.deb package
  mkdir out
  extract_vmlinux "package/boot/vmlinuz-$release" >out/vmlinux
  cp "package/boot/config-$release" out/config
  echo "$release" >out/release
  echo "$package $version" >out/source
  pick "${boot[@]}" >boot.list
  sed 's|^|/|' boot.list >out/modules-load.list
  pick "${boot[@]}" "${later[@]}" >all.list
  while read -r file; do install -D "package/$file" "out/modules/$file"; done <all.list
  # The text indexes say what depends on what and which alias is which module.
  cp "package/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "out/modules/lib/modules/$release/"
  depmod -b out/modules "$release"
  # Which PCI devices those drive, one a line. What is built in drives none that a node could hand over.
  sed -n 's/^alias \(pci:[^ ]*\) .*/\1/p' "out/modules/lib/modules/$release/modules.alias" | LC_ALL=C sort -u >out/pci
  find out/modules -name 'modules.*' ! -name modules.builtin ! -name modules.dep ! -name modules.alias ! -name modules.softdep -delete
  find out -type d -exec chmod 755 {} +
  find out -type f -exec chmod 644 {} +
}

key=$( { echo "$package" "$version" "${boot[@]}" "${later[@]}"; declare -f extract_vmlinux with_dependencies pick fetch; } | sha256sum | cut -c1-16)
out=$cache/debian-kernel-$key
mkdir -p "$cache"
exec 9>"$cache/debian-kernel.lock"
flock 9
if [ ! -d "$out" ]; then
  echo "kernel: fetching Debian's $package $version, usually 10 seconds" >&2
  work=$(mktemp -d "$cache/debian-kernel.XXXXXX")
  log=$cache/debian-kernel.log
  trap 'rm -rf "$work"; [ -d "$out" ] || echo "fetch-debian-kernel: failed; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  (
    set -o errtrace
    trap 'echo "failed: $BASH_COMMAND"' ERR
    cd "$work"
    fetch
    mv -T out "$out"
  ) >"$log" 2>&1 9>&-
fi
echo "$out"
