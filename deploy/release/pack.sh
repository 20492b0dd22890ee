#!/usr/bin/env bash
# Closes a release: writes the sums of the files in <release>/<name>-cluster, packs it, and writes the sums of what is
# beside it. With a key of GnuPG's, both lists of sums are signed.
#   pack.sh <release> <name> [<key>]
set -euo pipefail
[ $# = 2 ] || [ $# = 3 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
release=$1 name=$2 key=${3:-}
# The sums of all files below the current folder but those of $1, in the order of their names.
sums() {
  local files
  rm -f SHA256SUMS SHA256SUMS.asc
  files=$(find . -type f ! -path "$1" -printf '%P\n' | LC_ALL=C sort)
  xargs -d '\n' sha256sum <<<"$files" >SHA256SUMS
  [ -z "$key" ] || gpg --batch --quiet --local-user "$key" --armor --detach-sign SHA256SUMS
}
cd "$release/$name-cluster"
chmod -R u=rwX,go=rX .
sums ''
cd ..
tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --file "$name-cluster.tar" "$name-cluster"
sums "./$name-cluster/*"
