#!/usr/bin/env bash
# Builds cargo-cyclonedx, which writes the bill of materials of Rust programs; prints the program's path.
set -euo pipefail
cache=${SANDPOD_CACHE:-/var/cache/sandpod}
version=0.5.9
out=$cache/cargo-cyclonedx-$version-$(rustc --version | sha256sum | cut -c1-16)
mkdir -p "$cache"
exec 9>"$cache/cargo-cyclonedx.lock"
flock 9
if [ ! -x "$out/bin/cargo-cyclonedx" ]; then
  log=$cache/cargo-cyclonedx-build.log
  work=$(mktemp -d "$cache/cargo-cyclonedx-build.XXXXXX")
  trap 'rm -rf "$work"
    [ -d "$out" ] || echo "build-cyclonedx: failed; $log ends with: $(tail -n 3 "$log")" >&2' EXIT
  echo "cargo-cyclonedx: building $version, usually a minute on two cores (log: $log)" >&2
  # Not in the checkout: its cargo configuration is for our own programs. It runs for a second, so it is not optimized.
  (
    cd "$work"
    CARGO_TARGET_DIR=$work/target CARGO_PROFILE_DEV_DEBUG=none \
      cargo install --locked --quiet --debug --version "=$version" --root "$work/out" cargo-cyclonedx
    mv -T out "$out"
  ) >"$log" 2>&1 9>&-
fi
echo "$out/bin/cargo-cyclonedx"
