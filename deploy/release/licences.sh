#!/usr/bin/env bash
# Makes the folder with the licences of all that images and archives hold, and where its sources are had. Both images
# and each archive of a release carry it. The same inputs give the same bytes.
#   licences.sh <payload> <virtiofsd> <out>
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 3 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
payload=$1 virtiofsd=$2 out=$3
guest=$here/../guest
mkdir -p "$(dirname "$out")"
new=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$new"' EXIT
crates=$("$here/shipped.sh" crates "$virtiofsd")
debian=$("$here/shipped.sh" debian "$payload")
IFS=$'\t' read -r linux linux_version linux_package < <("$here/shipped.sh" kernel "$payload")

cp "$here/../../LICENSE" "$new/LICENSE"
# What the guest's kernel is made with, besides its source.
mkdir "$new"/{debian,common,guest-kernel}
cp "$guest"/{build-kernel.sh,kernel.config,kernel.tracing.config,*.patch} "$new/guest-kernel"
while read -r package; do
  copyright=/usr/share/doc/$package/copyright
  [ -f "$copyright" ] ||
    { echo "licences: $copyright is missing; install $package again, with its documentation" >&2; exit 1; }
  cp "$copyright" "$new/debian/$package.txt"
done < <({ cut -f3 <<<"$debian"; echo "$linux_package"; } | sort -u)
# The texts that those refer to.
for text in /usr/share/common-licenses/*; do
  if [ "${text##*/}" = Apache-2.0 ] || grep -qrE "common-licenses/${text##*/}\b" "$new/debian"; then
    cp -L "$text" "$new/common"
  fi
done

# Each text once, below the crates that have it. A crate without one has the text of the licence that it names.
work=$(mktemp -d)
trap 'rm -rf "$new" "$work"' EXIT
while IFS=$'\t' read -r name version folder licence; do
  texts=$(find "$folder" -maxdepth 1 -type f | grep -iE '/((un)?licen[cs]e|copying|copyright|notice)[^/]*$' || :)
  case ${texts:-$licence} in
    /*) ;;
    *Apache-2.0*) texts=/usr/share/common-licenses/Apache-2.0 ;;
    MIT) texts=$here/mit.txt ;;
    *)
      echo "licences: the crate $name $version has no licence text, and there is none here for '$licence'" >&2
      exit 1
      ;;
  esac
  while read -r text; do
    sum=$(sha256sum "$text")
    sum=${sum%% *}
    cp "$text" "$work/$sum.text"
    echo "$name $version, ${licence:-as in the text}" >>"$work/$sum.crates"
  done < <(LC_ALL=C sort <<<"$texts")
done <<<"$crates"
(cd "$work" && LC_ALL=C sort -s -k2 < <(for list in *.crates; do echo "${list%.crates} $(head -n 1 "$list")"; done)) |
  while read -r sum _; do
    printf '%.0s=' {1..120}
    echo
    LC_ALL=C sort -u "$work/$sum.crates"
    echo
    cat "$work/$sum.text"
    echo
  done >"$new/crates.txt"

snapshot() { echo "https://snapshot.debian.org/package/$1/$2/"; }
{
  cat <<TEXT
# What others have made of this, its licences and its sources

Sandpod is under the Apache License 2.0: LICENSE. It carries programs and libraries of others.

- crates.txt has the licences of the Rust crates in our programs and in virtiofsd. Each crate's source is at
  https://crates.io/crates/NAME/VERSION.
- debian/PACKAGE.txt has copyright and licences of each Debian package of which files are in the payload or code is in
  the programs, and of the kernel; common/ has the texts that they refer to.

## Sources

Some of these are under the GNU General Public License or the GNU Lesser General Public License, such as QEMU, SeaBIOS,
Linux, the GNU C library and libseccomp. The complete corresponding source of each, with Debian's changes and all that
it is built with, is the source package below, in exactly this version. Sandpod changes no source of theirs but that of
Linux, by the patches and with the configuration in guest-kernel/; build-kernel.sh there builds it. Of the program
qemu-system-x86_64 the search path for libraries and the name of the loader were changed by patchelf, and nothing else.

Whoever gives this release to others offers them, for at least three years and for no more than what a copy costs, the
same source packages on a medium customary for software interchange.

| source package | version | packages | source |
|---|---|---|---|
TEXT
  cut -f1-3 <<<"$debian" | awk -F '\t' '{ key = $1 "\t" $2; if (key != last) { if (last != "") print last "\t" names
      last = key; names = $3 } else if (index(", " names ", ", ", " $3 ", ") == 0) names = names ", " $3 }
    END { print last "\t" names }' |
    while IFS=$'\t' read -r source version packages; do
      echo "| $source | $version | $packages | $(snapshot "$source" "$version") |"
    done
  echo "| $linux | $linux_version | the guest's kernel | $(snapshot "$linux" "$linux_version") |"
} >"$new/THIRD-PARTY.md"

find "$new" -type d -exec chmod 755 {} +
find "$new" -type f -exec chmod 644 {} +
rm -rf "$out"
mv -T "$new" "$out"
echo "licences: $out, of $(wc -l <<<"$crates") crates and $(cut -f3 <<<"$debian" | sort -u | wc -l) Debian packages" >&2
