#!/usr/bin/env bash
# Builds virtiofsd, the file server between a node and its pods' virtual machines; prints the path of the program. The
# folder `source` beside the one that it is in has what it was built of.
# Static like our own programs, so that a node needs none of this machine's libraries. A panic ends it: one thread
# serves the guest, and a server that loses that thread alone would leave the guest waiting for ever.
set -euo pipefail
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
version=1.14.0
target=x86_64-unknown-linux-gnu
flags='-C target-feature=+crt-static'
key=$( { echo "$version $flags archives abort source"; rustc --version; dpkg-query -W libseccomp-dev libcap-ng-dev libc6-dev; } | sha256sum | cut -c1-16)
out=$cache/virtiofsd-$version-$key
mkdir -p "$cache"
exec 9>"$cache/virtiofsd.lock"
flock 9
if [ ! -x "$out/bin/virtiofsd" ]; then
  log=$cache/virtiofsd-build.log
  work=$(mktemp -d "$cache/virtiofsd-build.XXXXXX")
  trap 'rm -rf "$work"; [ -d "$out" ] || echo "build-virtiofsd: failed; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  echo "virtiofsd: building $version, usually a minute on two cores (log: $log)" >&2
  # Not in the checkout: its cargo configuration is for our own programs. The linker is shown a folder that has the two
  # libraries as archives only, or it would take the shared ones and make a program that is half static and crashes.
  (
    cd "$work"
    mkdir lib
    ln -s -t lib /usr/lib/x86_64-linux-gnu/lib{cap-ng,seccomp}.a
    RUSTFLAGS="$flags -L native=$work/lib" CARGO_TARGET_DIR=$work/target CARGO_PROFILE_RELEASE_PANIC=abort \
      cargo install --locked --quiet --target $target --version "=$version" --root "$work/out" virtiofsd
    if readelf -lW out/bin/virtiofsd | grep INTERP; then exit 1; fi
    strip out/bin/virtiofsd
    find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -maxdepth 2 -name "virtiofsd-$version" -exec cp -rT {} out/source \;
    [ -f out/source/Cargo.lock ]
    mv -T out "$out"
  ) >"$log" 2>&1 9>&-
fi
echo "$out/bin/virtiofsd"
