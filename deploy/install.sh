#!/bin/sh
# Installs Sandpod on this node, without Kubernetes: afterwards `crictl runp --runtime kata` runs pods in virtual machines. Needs containerd 2 or CRI-O 1.24, running.
#   install.sh [--prefix DIR] [--cri crio|containerd] [--log-level LEVEL] [--restart-command "COMMAND WORD ..."]
#              [--add-imports]      adds the line that imports drop-ins to containerd's config.toml, if it is missing
#   install.sh --uninstall [...]      takes everything away again
# In a release it lies beside `sandpod-installer` and `payload`; in a checkout it uses what `make payload` has made.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
installer=$here/sandpod-installer payload=$here/payload
if [ ! -d "$payload" ]; then
  installer=$here/../target/x86_64-unknown-linux-gnu/release/sandpod-installer payload=${SANDPOD_PAYLOAD:-$here/../target/payload}
fi
[ -x "$installer" ] && [ -f "$payload/MANIFEST" ] ||
  { echo "install: there is nothing to install; run make payload first" >&2; exit 1; }
verb=install
case ${1:-} in
  --uninstall) verb=uninstall; shift ;;
  -h | --help) sed -n '2,6s/^# *//p' "$0"; exit ;;
esac
if [ $verb = install ]; then set -- --payload "$payload" "$@"; fi
"$installer" $verb "$@" >/dev/null
case $verb in
  install) echo "install: done; try crictl runp --runtime kata, or a RuntimeClass with the handler kata" ;;
  uninstall) echo "install: nothing of Sandpod is left on this node" ;;
esac
