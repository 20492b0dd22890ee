#!/usr/bin/env bash
# Builds the real programs that the tests run Sandpod under, pinned by go.mod and go.sum in the folder of each
# peer; prints the folder that holds them. What is built is kept under the hash of its own peer's pins, so a peer
# is built again only when it changes; the printed folder holds links to all that were asked for. Of a peer's modules
# it needs files besides, or nothing but files, where `files` says so: they are in the folder `share` beside. A peer that
# is another version of one (<peer>-<version>) has programs of the same names: they are in a folder of its name beside.
#   tests/peers/build.sh [<peer>...]      without arguments: every peer
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
# A go.mod may ask for a later Go than the one installed; fetching that is Go's own business.
export GOTOOLCHAIN=${GOTOOLCHAIN:-auto} CGO_ENABLED=0
[ $# -gt 0 ] || { cd "$here"; set -- */; set -- "${@%/}"; }
for peer; do
  [ -f "$here/$peer/go.mod" ] || { echo "peers: there is no peer named $peer in $here" >&2; exit 2; }
done
mkdir -p "$cache"
exec 9>"$cache/peers.lock"
flock 9

# The hash of what makes a peer: its pins, this script, and the Go that compiles it.
key() { (cd "$here/$1" && { go env GOVERSION; cat go.mod go.sum ../build.sh; [ ! -f files ] || cat files; } | sha256sum | cut -c1-16); }

# The version at which the peer in the current folder pins a module.
pinned() { sed -n "s|^\(require\)\?\s*$1 \(v[^ ]*\).*|\2|p" go.mod; }

# Copies what `files` of the peer in the current folder names, lines of a module and names of files in it, into $1.
fetch() {
  local module names folder
  [ -f files ] || return 0
  mkdir -p "$1"
  while read -r module names; do
    folder=$(go mod download -json "$module@$(pinned "$module")" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p') || return
    # Names may be patterns.
    install -m 644 -t "$1" "$folder"/$names || return
  done <files
}

# Compiles the programs of the peer in the current folder into $1. The caller looks at the status, so -e does not.
compile() {
  local cri_tools kubernetes programs suites suite flags
  cri_tools=$(pinned sigs.k8s.io/cri-tools)
  # Whatever has this module panics without a version of Kubernetes; the two go together.
  kubernetes=$(pinned k8s.io/component-base | sed 's/^v0/v1/')
  # The linker ignores a variable that a program lacks; the tags leave out containerd's snapshotters for file
  # systems that no test has.
  flags=(-mod=readonly -trimpath -tags='no_btrfs no_devmapper no_zfs'
    -ldflags="-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$cri_tools
      -X k8s.io/component-base/version.gitVersion=$kubernetes")
  # Every program of one peer in one go command: what they share is compiled once. A tool that is nothing but tests
  # becomes a program by another command.
  programs=$(go list -f '{{if .GoFiles}}{{.ImportPath}}{{end}}' tool) || return
  suites=$(go list -f '{{if not .GoFiles}}{{.ImportPath}}{{end}}' tool) || return
  xargs -r nice -n 5 go build "${flags[@]}" -o "$1/" <<<"$programs" || return
  for suite in $suites; do
    nice -n 5 go test -c "${flags[@]}" -o "$1/${suite##*/}" "$suite" || return
  done
}

links=$cache/peers-$(for peer in "$here"/*/; do key "$(basename "$peer")"; done | sha256sum | cut -c1-16)
mkdir -p "$links/bin"
for peer; do
  out=$cache/peer-$peer-$(key "$peer")
  if [ ! -f "$out/built" ]; then
    mkdir -p "$out/bin"
    cd "$here/$peer"
    echo "peers: building $peer$(sed -n 's|^// usually|, usually|p' go.mod)" >&2
    { fetch "$out/share" && compile "$out/bin"; } >"$out/log" 2>&1 ||
      { echo "peers: building $peer failed; $out/log ends with: $(tail -n 3 "$out/log")" >&2; exit 1; }
    touch "$out/built"
  fi
  case $peer in
    *-[0-9]*) place=$links/$peer ;;
    *) place=$links ;;
  esac
  # Not symbolic ones: what looks for its neighbours by its own path finds all of them.
  for kind in bin share; do
    [ -z "$(ls -A "$out/$kind" 2>/dev/null)" ] || { mkdir -p "$place/$kind" && ln -f "$out/$kind"/* "$place/$kind/"; }
  done
done
echo "$links/bin"
