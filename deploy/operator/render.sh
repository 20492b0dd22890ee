#!/bin/sh
# Prints deploy/install.yaml: the resources of kustomization.yaml, in its order, in one file. `kubectl kustomize` would order and write them otherwise and lose the
# comments; the objects are the same, which tests/cluster shows.
set -eu
cd "$(dirname "$0")"
echo '# Made by deploy/operator/render.sh from the files beside it. Change those.'
sed -n 's/^- //p' kustomization.yaml | while read -r file; do
  echo '---'
  cat "$file"
done
