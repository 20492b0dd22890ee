#!/usr/bin/env bash
# What `make demo` does, as far as it is a question of packages; check.sh runs it where only those for `make demo` are.
# $FRESH_BUILD is a folder for what need not be built anew each time.
set -euo pipefail
# Without debug information: the programs are only to be compiled and linked.
CARGO_PROFILE_DEV_DEBUG=none CARGO_TARGET_DIR=$FRESH_BUILD/target cargo build --quiet --workspace --bins
guest=$(mktemp -d)/debian
(
  export SANDPOD_CACHE=$FRESH_BUILD
  deploy/build-virtiofsd.sh >/dev/null
  deploy/guest/build-image.sh debian "$SANDPOD_BIN/kata-agent" "$guest"
)
SANDPOD_GUEST_DEBIAN=$guest "$SANDPOD_BIN/demo"
