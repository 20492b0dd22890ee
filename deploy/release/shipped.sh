#!/usr/bin/env bash
# Tells what of other people's a release holds, for the bill of materials and for the licences. Each is a line, in
# order, its words separated by tabs:
#   shipped.sh crates <virtiofsd>   name, version, folder and licence of each crate in our programs and in virtiofsd
#   shipped.sh debian <payload>     source package, its version, package, its version and where it is: in the payload,
#                                   or in the programs that it was linked into
#   shipped.sh kernel <payload>     source package and version of what the guest's kernel was built of, and its package
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 2 ] || { sed -n '4,7s/^# *//p' "$0" >&2; exit 2; }
target=x86_64-unknown-linux-gnu
# The packages that have our programs; virtiofsd's is the one in the current folder.
ours=(--package agent --package installer --package operator --package shim)

# The crates that are compiled into programs of the package in the current folder, or into what compiles them.
crates() {
  local closure
  closure=$(cargo tree --locked --quiet --edges normal --target $target --prefix none --format '{p}' "$@" |
    sed -E 's/^([^ ]+) v([^ ]+).*/\1\t\2/' | LC_ALL=C sort -u)
  cargo metadata --locked --quiet --format-version 1 --filter-platform $target |
    jq -r '.packages[] | select(.source or .name == "virtiofsd")
      | [.name, .version, (.manifest_path | rtrimstr("/Cargo.toml")), (.license // "")] | @tsv' |
    awk -F '\t' 'NR == FNR { wanted[$1, $2]; next } ($1, $2) in wanted' <(echo "$closure") -
}
# As dpkg has them installed, which is what was put into the payload or linked.
packages() { dpkg-query -W -f '${source:Package}\t${source:Version}\t${Package}\t${Version}\n' "$@"; }

case $1 in
  crates)
    source=$(dirname "$(dirname "$(realpath "$2")")")/source
    [ -f "$source/Cargo.lock" ] ||
      { echo "shipped: $source is not virtiofsd's source; give the program that deploy/build-virtiofsd.sh makes" >&2
        exit 1; }
    { (cd "$here/../.." && crates "${ours[@]}"); (cd "$source" && crates); } | LC_ALL=C sort -u -t $'\t' -k1,2
    ;;
  debian)
    {
      sed -n 's/^\([^ ]*\) \([^ ]*\) (\([^ ]*\) \([^ ]*\))$/\1\t\2\t\3\t\4\tpayload/p' "$2/share/doc/debian-packages"
      # What is linked from archives is in no list.
      packages libc6-dev "libgcc-$(gcc -dumpversion)-dev" | sed 's/$/\tall/'
      packages libseccomp-dev | sed 's/$/\tkata-agent virtiofsd/'
      packages libcap-ng-dev | sed 's/$/\tvirtiofsd/'
      packages libelf-dev zlib1g-dev | sed 's/$/\tkata-agent/'
    } | LC_ALL=C sort
    ;;
  kernel)
    # The manifest has the package and its version: "linux-source-6.12 6.12.1-1".
    read -r package version < <(jq -r .kernel.source "$2/manifest.json")
    packages "$package" | awk -F '\t' -v version="$version" '{ print $1 "\t" version "\t" $3 }'
    ;;
  *) sed -n '4,7s/^# *//p' "$0" >&2; exit 2 ;;
esac
