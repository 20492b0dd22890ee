#!/usr/bin/env bash
# Makes the two container images of the operator, as OCI archives for `ctr images import`, `skopeo copy` or a registry of
# one's own, and prints their sizes:
#   <out>/operator.tar    sandpod.io/operator:<version>     the controller, as a user without rights
#   <out>/installer.tar   sandpod.io/installer:<version>    the installer, and what it installs
# Nothing is pulled: they begin empty and hold our release build, and the licences of all that is in it, where they are
# given. The same inputs give the same bytes.
#   images.sh <programs> <payload> <out> [<licences>]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 3 ] || [ $# = 4 ] || { sed -n '8s/^# *//p' "$0" >&2; exit 2; }
programs=$1 payload=$2 out=$3 licences=${4:-}
for file in "$programs"/sandpod-{operator,installer} "$payload/MANIFEST"; do
  [ -f "$file" ] || { echo "images: $file does not exist; run make payload first" >&2; exit 1; }
done
for file in "$programs"/sandpod-{operator,installer}; do
  if readelf -lW "$file" | grep -q INTERP; then
    echo "images: $file is linked dynamically, and its image has no libraries" >&2
    exit 1
  fi
done
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml")
# As the installer names what it installs, and the controller what it wants installed.
installed=$version-$(sha256sum "$payload/MANIFEST" | cut -c1-8)

mkdir -p "$out"
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A store of its own, beside what the machine's other images are kept in; and nobody's rules for pulling, for there is nothing to pull.
echo '{ "default": [{ "type": "insecureAcceptAnything" }] }' >"$work/policy.json"
store() {
  buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@" </dev/null >>"$work/log" 2>&1 ||
    { echo "images: buildah $1 failed: $(tail -n 1 "$work/log")" >&2; exit 1; }
}

# One image from the folder $work/<name>: its name, the sentence that describes it, and what else is set.
image() {
  local name=$1 about=$2 reference=sandpod.io/$1:$version layout=$work/$1.oci
  shift 2
  store from --name "$name" scratch
  store copy --quiet "$name" "$work/$name" /
  store config "$@" --entrypoint "[\"/sandpod-$name\"]" --cmd '' --os linux --arch amd64 \
    --label org.opencontainers.image.title="sandpod-$name" --label org.opencontainers.image.description="$about" \
    --label org.opencontainers.image.version="$version" --label sandpod.io/version="$installed" \
    --label org.opencontainers.image.licenses=Apache-2.0 "$name"
  store commit --quiet --timestamp 0 --omit-history --identity-label=false --rm "$name" "$reference"
  store push --quiet --signature-policy "$work/policy.json" "$reference" "oci:$layout:$reference"
  tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --directory "$layout" --file "$work/$name.tar" .
  mv "$work/$name.tar" "$out/$name.tar"
  echo "images: $reference, $(($(stat -c %s "$out/$name.tar") / 1048576)) MiB in $out/$name.tar" >&2
}

# A program, and what it is licensed by.
fill() {
  install -D -t "$work/$1" "$programs/sandpod-$1"
  install -m 644 -t "$work/$1" "$here/../LICENSE"
  [ -z "$licences" ] || cp -r "$licences" "$work/$1/licenses"
}
fill operator
# What the controller wants on the nodes is what the installer of the same build carries, unless its Deployment says otherwise.
image operator 'Installs kata on the nodes that a KataConfig asks for' --user 65532:65532 --port 8080 \
  --env SANDPOD_VERSION="$installed" --env SANDPOD_INSTALLER_IMAGE="sandpod.io/installer:$version"

fill installer
cp -r "$payload" "$work/installer/payload"
# The node's root folder is mounted here.
mkdir "$work/installer/host"
image installer 'Puts Sandpod on one node, looks after it, or takes it away' --user 0:0
