#!/usr/bin/env bash
# Tries whether deploy/deps.sh names every header, library and program that the quick start needs: does parts of it on a
# Debian 12 that has only the packages of the named groups, with our programs as they are built already. What this
# machine has besides cannot help.
#   tests/fresh/check.sh "<groups of make demo>" "<groups of make test>"
set -euo pipefail
# The tokens of make's jobs do not go along.
unset MAKEFLAGS
here=$(cd "$(dirname "$0")" && pwd)
top=${here%/tests/fresh}
[ $# = 2 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
cd "$top"

# Runs a script of this folder with the packages of these groups, and a folder that stays.
with_packages_of() {
  local groups=$1 script=$2 packages root
  # Groups are words.
  mapfile -t packages < <(deploy/deps.sh --list $groups)
  root=$("$here/root.sh" "${packages[@]}")
  # What was built with other packages says nothing of these.
  export FRESH_BUILD=${SANDPOD_CACHE:-/var/cache/sandpod}/fresh-build-${root##*-}
  mkdir -p "$FRESH_BUILD"
  "$here/run.sh" --here "${packages[@]}" -- "$here/$script"
}

# Prints where scripts and tests ($named) name a program that this machine has and a root has not.
missing_from() {
  local place name missing
  missing=$(LC_ALL=C comm -23 <(programs "") <({ programs "$1"; compgen -b; } | LC_ALL=C sort -u))
  awk 'NR == FNR { missing[$1]; next } $2 in missing' <(echo "$missing") <(echo "$named") |
    while read -r place name; do echo "$place runs $name, which is of the package $(package_of "$name")"; done
}
programs() { find "$1"/usr/{,local/}{s,}bin -maxdepth 1 ! -type d -printf '%f\n' | LC_ALL=C sort -u; }
package_of() { { dpkg -S "*bin/$1" || echo '(unknown):'; } 2>/dev/null | sed 's/:.*//;q'; }
# As <file>:<line> <name>, the first word of each command.
named_in_scripts() {
  local keyword='(then|do|else|if|while|until|exec|xargs|nice|env|sudo|command -v)\s+'
  local start="(^|[|;&({!\`]|\b$keyword)\s*($keyword|\w+=\S*\s+)*"
  grep -rnoP "^\s*#.*|\s##?\s.*|$start\K[a-z][\w.+-]*(?=[\s;)|&]|$)" Makefile .ci deploy tests/fresh tests/peers \
    --include=Makefile --include='*.sh' --include=run | sed -nE 's/^([^:]+:[0-9]+):([a-z])/\1 \2/p'
}
named_in_tests() {
  grep -rnoP '(Command::new|\.command)\("\K[^"/ ]+' tests agent/tests vmm/tests --include='*.rs' |
    sed -E 's/^([^:]+:[0-9]+):/\1 /'
}
# What the tests build themselves is of no package.
named_in_the_page() {
  awk '/^[$#] [a-z]/ {
    count = split(substr($0, 3), commands, / *\| */)
    for (i = 1; i <= count; i++) {
      split(commands[i], words, " ")
      if (words[1] ~ /^[a-z][a-z0-9.-]*$/ && !index(" crictl helm kubectl ", " " words[1] " "))
        print FILENAME ":" FNR, words[1]
    }
  }' docs/operator.md
}

# First what takes seconds: programs by their names, and whether the eyes are open.
mapfile -t packages < <(deploy/deps.sh --list $2)
named=$({ named_in_scripts; named_in_tests; named_in_the_page; })
for name in curl ip pgrep readelf zstd; do
  grep -q " $name\$" <<<"$named" || { echo "fresh: $0 does not see any more that something runs $name" >&2; exit 1; }
done
missing=$(missing_from "$("$here/root.sh" "${packages[@]}")")
[ -z "$missing" ] ||
  { printf 'fresh: no group of deploy/deps.sh installs what this needs:\n%s\n' "$missing" >&2; exit 1; }

echo "fresh: the demo, and what is built for it, with the packages of '$1' alone, usually 2 minutes" >&2
echo "       (some more when there is nothing yet that was built with them)" >&2
with_packages_of "$1" demo.sh
echo "fresh: payload, images, release and a whole cluster with the packages of '$2' alone, usually 2 minutes" >&2
with_packages_of "$2" test.sh
