#!/bin/sh
# Prints deploy/install.yaml: the resources of kustomization.yaml, in its order, in one file. `kubectl kustomize` would
# order and write them otherwise and lose the comments; the objects are the same, which tests/cluster shows.
# With --monitor it prints deploy/monitoring/daemonset.yaml instead.
#
# Both images, the controller's and the one that it has pulled for its installers and that the monitors run in, can be
# those of another registry (by default sandpod.io), and be named by their digests in the place of their tags:
#   render.sh [--monitor] [<registry>[/<path>] [<digest of operator> <digest of installer>]]
set -eu
cd "$(dirname "$0")"
what=install
if [ "${1:-}" = --monitor ]; then what=monitor; shift; fi
case $# in 0 | 1 | 3) ;; *) sed -n '8s/^# *//p' render.sh >&2; exit 2 ;; esac
registry=${1:-sandpod.io} operator=${2:+"@$2"} installer=${3:+"@$3"}
install() {
  echo '# Made by deploy/operator/render.sh from the files beside it. Change those.'
  sed -n 's/^- //p' kustomization.yaml | while read -r file; do
    echo '---'
    cat "$file"
  done
}
monitor() { cat ../monitoring/daemonset.yaml; }
$what | sed -e "s|sandpod\.io/operator\(:[^ ]*\)|$registry/operator${operator:-\\1}|" \
  -e "s|sandpod\.io/installer\(:[^ ]*\)|$registry/installer${installer:-\\1}|"
