#!/usr/bin/env bash
# Builds the real programs that the tests run Sandpod under, pinned by go.mod and go.sum in the folder of each
# peer; prints the folder that holds them. Its name is the hash of all the pins, so built peers cost nothing.
#   tests/peers/build.sh [<peer>...]      without arguments: every peer
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
# A go.mod may ask for a later Go than the one installed; fetching that is Go's own business.
export GOTOOLCHAIN=${GOTOOLCHAIN:-auto} CGO_ENABLED=0
[ $# -gt 0 ] || { cd "$here"; set -- */; set -- "${@%/}"; }

key=$( { go env GOVERSION; cat "$here"/*/go.mod "$here"/*/go.sum "$here/build.sh"; } | sha256sum | cut -c1-16)
out=$cache/peers-$key
mkdir -p "$out/bin"
exec 9>"$out/lock"
flock 9
for peer; do
  [ -f "$here/$peer/go.mod" ] || { echo "peers: there is no peer named $peer in $here" >&2; exit 2; }
  [ ! -f "$out/$peer.built" ] || continue
  cd "$here/$peer"
  echo "peers: building $peer$(sed -n 's|^// usually|, usually|p' go.mod)" >&2
  # Every program of one peer in one go command: what they share is compiled once. The linker ignores a variable
  # that a program lacks; the tags leave out containerd's snapshotters for file systems that no test has.
  version=$(sed -n 's/^\tsigs.k8s.io.cri-tools \(v[^ ]*\).*/\1/p' go.mod)
  go list -f '{{.ImportPath}}' tool 2>"$out/$peer.log" |
    nice -n 5 xargs go build -mod=readonly -trimpath -tags='no_btrfs no_devmapper no_zfs' \
      -ldflags="-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$version" -o "$out/bin/" >>"$out/$peer.log" 2>&1 ||
    { echo "peers: building $peer failed; $out/$peer.log ends with: $(tail -n 3 "$out/$peer.log")" >&2; exit 1; }
  touch "$out/$peer.built"
done
echo "$out/bin"
