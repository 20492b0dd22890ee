#!/usr/bin/env bash
# Makes what a publisher of Sandpod publishes, from what is built: <out>/
#   sandpod-<version>-cluster/          both images, chart, manifest, bill of materials, licences, and push.sh
#   sandpod-<version>-cluster.tar       the same in one file
#   sandpod-<version>-x86_64.tar.gz     for one node without Kubernetes: install.sh and what it installs
#   SHA256SUMS
# The same inputs give the same bytes. deploy/release/sign.sh signs it.
#   release.sh <programs> <payload> <images> <licences> <virtiofsd> <out>
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 6 ] || { sed -n '8s/^# *//p' "$0" >&2; exit 2; }
programs=$1 payload=$2 images=$3 licences=$4 virtiofsd=$5 out=$6
for file in "$programs/sandpod-installer" "$payload/MANIFEST" "$images"/{operator,installer}.tar \
  "$licences/THIRD-PARTY.md"; do
  [ -f "$file" ] || { echo "release: $file does not exist; run make images first" >&2; exit 1; }
done
# Of one build: the controller's image says what the installer of that build carries.
version=$(sed -n 's/^sandpod //p;q' "$payload/MANIFEST")
carried=$version-$(sha256sum "$payload/MANIFEST" | cut -c1-8)
name=sandpod-$version
mkdir -p "$(dirname "$out")"
new=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new"
cluster=$new/$name-cluster
mkdir -p "$cluster/images"

# A file in an archive in images/, by its name or digest.
part() {
  local file=${2/#sha256:/blobs/sha256/}
  tar --extract --to-stdout --file "$cluster/images/$1" "./$file"
}
# A line of the file `digests`: an archive in images/, its name and its digest.
line() {
  part "$1" index.json | jq -r --arg archive "$1" \
    '.manifests[] | "\($archive) \(.annotations["org.opencontainers.image.ref.name"]) \(.digest)"'
}
for image in operator installer; do
  cp "$images/$image.tar" "$cluster/images"
  line $image.tar >>"$cluster/digests"
  read -r _ reference digest < <(tail -n 1 "$cluster/digests")
  config=$(part $image.tar "$digest" | jq -r .config.digest)
  made=$(part $image.tar "$config" | jq -r '.config.Labels["sandpod.io/version"]')
  [ "$reference $made" = "sandpod.io/$image:$version $carried" ] ||
    { echo "release: $image.tar is $reference with $made, and the payload is $carried; run make images again" >&2
      exit 1; }
done
mapfile -t digests < <(cut -d' ' -f3 "$cluster/digests")
"$here/chart.sh" "${digests[@]}" "$cluster" "$cluster/images"
line chart.tar >>"$cluster/digests"
sh "$here/../operator/render.sh" sandpod.io "${digests[@]}" >"$cluster/install.yaml"
sh "$here/../operator/render.sh" --monitor sandpod.io "${digests[@]}" >"$cluster/monitor.yaml"
"$here/sbom.sh" "$version" "$payload" "$virtiofsd" "$cluster/digests" >"$cluster/$name.cdx.json"
cp -r "$licences" "$cluster/licences"
# What the nodes' annotation says when they have it.
echo "$carried" >"$cluster/VERSION"
install -m 755 "$here/push.sh" "$cluster"
install -m 644 "$here/README.md" "$cluster"

node=$new/$name-x86_64
mkdir "$node"
install -m 755 "$here/../install.sh" "$programs/sandpod-installer" "$node"
cp -r "$payload" "$node/payload"
cp -r "$licences" "$node/licences"
cp "$cluster/$name.cdx.json" "$node"
chmod -R u=rwX,go=rX "$node"
tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --directory "$new" "$name-x86_64" |
  gzip -n >"$node.tar.gz"
rm -r "$node"
"$here/pack.sh" "$new" "$name"
rm -rf "$out"
mv -T "$new" "$out"
echo "release: $out, $(($(stat -c %s "$out/$name-cluster.tar") / 1048576)) MiB for clusters," \
  "$(($(stat -c %s "$out/$name-x86_64.tar.gz") / 1048576)) MiB for one node" >&2
