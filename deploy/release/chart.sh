#!/usr/bin/env bash
# Packages the Helm chart, with both images by their digests as the default: as sandpod-<version>.tgz, and in chart.tar
# as the OCI artefact that `helm push` would make of it (https://helm.sh/docs/topics/registries/). A package is a
# compressed tar, so no Helm is needed. The same inputs give the same bytes.
#   chart.sh <digest of operator> <digest of installer> <folder for the tgz> <folder for chart.tar>
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 4 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
operator=$1 installer=$2 package=$3 artefact=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack() { tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX "$@"; }

# It has links to deploy/operator; a package has files.
cp -rL "$here/../chart" "$work/sandpod"
while read -r ignored; do rm "$work/sandpod/$ignored"; done <"$work/sandpod/.helmignore"
rm "$work/sandpod/.helmignore"
sed -i -e "s|^  operator: \"\"|  operator: $operator|" -e "s|^  installer: \"\"|  installer: $installer|" \
  "$work/sandpod/values.yaml"
[ "$(grep -cE '^  (operator|installer): sha256:[0-9a-f]{64}$' "$work/sandpod/values.yaml")" = 2 ] ||
  { echo "chart: deploy/chart/values.yaml has no empty digests of operator and installer any more" >&2; exit 1; }
# Chart.yaml is flat: each line a name and a word, a sentence, or a list in brackets.
jq -Rn '[inputs | capture("^(?<key>[A-Za-z]+): (?<value>.*)$")
  | .value |= if startswith("[") then .[1:-1] | split(", *"; "") else gsub("^\"|\"$"; "") end] | from_entries' \
  "$work/sandpod/Chart.yaml" >"$work/config"
[ "$(jq length "$work/config")" = "$(wc -l <"$work/sandpod/Chart.yaml")" ] ||
  { echo "chart: deploy/chart/Chart.yaml has lines that are not <name>: <value>" >&2; exit 1; }
version=$(jq -r .version "$work/config")
tgz=$package/sandpod-$version.tgz
pack --directory "$work" sandpod | gzip -n9 >"$tgz"

# An image's layout (https://github.com/opencontainers/image-spec/blob/main/image-layout.md).
mkdir -p "$work/layout/blobs/sha256"
# Puts a file there, and prints its descriptor.
blob() {
  local sum
  sum=$(sha256sum "$2" | cut -d' ' -f1)
  cp "$2" "$work/layout/blobs/sha256/$sum"
  jq -cn --arg type "$1" --arg digest "sha256:$sum" --argjson size "$(stat -c %s "$2")" \
    '{ mediaType: $type, digest: $digest, size: $size }'
}
config=$(blob application/vnd.cncf.helm.config.v1+json "$work/config")
layer=$(blob application/vnd.cncf.helm.chart.content.v1.tar+gzip "$tgz")
manifest=application/vnd.oci.image.manifest.v1+json
jq -n --argjson config "$config" --argjson layer "$layer" --slurpfile chart "$work/config" --arg type "$manifest" '{
  schemaVersion: 2, mediaType: $type, config: $config, layers: [$layer],
  annotations: {
    "org.opencontainers.image.title": $chart[0].name, "org.opencontainers.image.version": $chart[0].version,
    "org.opencontainers.image.description": $chart[0].description, "org.opencontainers.image.url": $chart[0].home } }' \
  >"$work/manifest"
blob "$manifest" "$work/manifest" | jq --arg name "sandpod.io/charts/sandpod:$version" \
  '{ schemaVersion: 2, manifests: [. + { annotations: { "org.opencontainers.image.ref.name": $name } }] }' \
  >"$work/layout/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$work/layout/oci-layout"
pack --directory "$work/layout" --file "$artefact/chart.tar" .
