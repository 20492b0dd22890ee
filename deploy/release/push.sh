#!/bin/sh
# Pushes both images and the chart of this release to a registry, and writes into the folder `pushed` what installs from
# there: install.yaml and monitor.yaml for kubectl, helm.sh for Helm, and, in a release that is signed, the signatures as
# that registry's names have them.
#   push.sh <registry>[/<path>] [<flag of skopeo copy> ...]
# such as: push.sh registry.example.com/sandpod --dest-creds user:password
set -eu
cd "$(dirname "$0")"
case ${1:-} in
  '' | -*) sed -n '5,6s/^# *//p' push.sh >&2; exit 2 ;;
  *://* | */)
    echo "push: '$1' is a URL or ends with a slash; give registry and path, such as registry.example.com/sandpod" >&2
    exit 2
    ;;
esac
registry=$1
shift
command -v skopeo >/dev/null ||
  { echo "push: skopeo is missing; install the package skopeo, 1.6 or later" >&2; exit 1; }
sha256sum --check --quiet SHA256SUMS >&2 ||
  { echo "push: the files above are not as they were published, so nothing was pushed; unpack the archive again" >&2
    exit 1; }

rm -rf pushed
mkdir pushed
while read -r archive reference digest; do
  path=${reference#*/}
  echo "push: $registry/$path" >&2
  # The sums have been compared, so it is no question of a policy. As it is: the manifest names images by digests.
  skopeo --insecure-policy copy --quiet --preserve-digests "$@" "oci-archive:images/$archive" "docker://$registry/$path"
  version=${path##*:}
  signatures=${path%:*}@sha256=${digest#*:}
  # A signature is looked for below the registry's whole path.
  case $registry in */*) whole=${registry#*/}/$signatures ;; *) whole=$signatures ;; esac
  if [ -d signatures ]; then
    mkdir -p "pushed/signatures/${whole%/*}"
    cp -r "signatures/$signatures" "pushed/signatures/$whole"
  fi
done <digests
for manifest in install.yaml monitor.yaml; do
  sed -e "s#sandpod\.io/operator@#$registry/operator@#" -e "s#sandpod\.io/installer@#$registry/installer@#" \
    "$manifest" >"pushed/$manifest"
done
cat >pushed/helm.sh <<END
#!/bin/sh
exec helm install sandpod oci://$registry/charts/sandpod --version $version --set registry=$registry "\$@"
END
echo "push: done. Install with one of these:"
echo "  kubectl apply --filename $PWD/pushed/install.yaml"
sed -n 's/^exec \(.*\) "$@"$/  \1/p' pushed/helm.sh
