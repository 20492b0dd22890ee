#!/usr/bin/env bash
# Signs a release with a key that GnuPG has here: images and chart as skopeo, Podman and CRI-O check them by a
# policy.json (containers-signature(5)), the chart's package as `helm verify` does, and both SHA256SUMS. The public key
# is put beside them, as key.gpg.
#   sign.sh <release> <key>
# <release> is the folder that `make release` has made; <key> is a fingerprint, or whatever names one key to GnuPG.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 2 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
release=$1
cluster=$(find "$release" -mindepth 1 -maxdepth 1 -type d -name 'sandpod-*-cluster')
[ -f "$cluster/digests" ] || { echo "sign: $release is no release; run make release first" >&2; exit 1; }
key=$({ gpg --batch --with-colons --list-secret-keys "$2" 2>/dev/null || :; } |
  awk -F : '$1 == "fpr" && !seen++ { print $10 }')
[ -n "$key" ] ||
  { echo "sign: GnuPG has no secret key $2; gpg --list-secret-keys lists those that it has" >&2; exit 1; }
# What is signed is what was made.
for folder in "$release" "$cluster"; do
  (cd "$folder" && sha256sum --check --quiet SHA256SUMS) ||
    { echo "sign: $folder is not as make release has made it; make it again" >&2; exit 1; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# As a web server or a folder has them for those who check: <path>@sha256=<digits>/signature-1.
rm -rf "$cluster/signatures" "$cluster"/*.prov
while read -r archive reference digest; do
  path=${reference#*/}
  folder=$cluster/signatures/${path%:*}@${digest/:/=}
  mkdir -p "$folder"
  tar --extract --to-stdout --file "$cluster/images/$archive" "./blobs/${digest/://}" >"$work/manifest"
  skopeo standalone-sign "$work/manifest" "$reference" "$key" --output "$folder/signature-1" >&2
done <"$cluster/digests"

# The chart's description and the package's sum (https://helm.sh/docs/topics/provenance/).
chart=$(basename "$cluster"/sandpod-*.tgz)
{
  tar --extract --gzip --to-stdout --file "$cluster/$chart" sandpod/Chart.yaml
  printf '\n...\nfiles:\n  %s: sha256:%s\n' "$chart" "$(sha256sum "$cluster/$chart" | cut -d' ' -f1)"
} | gpg --batch --quiet --local-user "$key" --digest-algo SHA512 --clear-sign >"$work/prov"
mv "$work/prov" "$cluster/$chart.prov"
gpg --batch --quiet --export "$key" >"$cluster/key.gpg"
"$here/pack.sh" "$release" "${chart%.tgz}" "$key"
echo "sign: $release is signed by $key" >&2
