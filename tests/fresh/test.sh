#!/usr/bin/env bash
# What `make test` does besides, as far as it is a question of packages; check.sh runs it where only those for
# `make test` are. $FRESH_BUILD is a folder that stays from one time to the next.
set -euo pipefail
recipe=$(cat deploy/guest/{build-kernel.sh,kernel.config,*.patch} | sha256sum | cut -c1-16)
if [ ! -f "$FRESH_BUILD/kernel-$recipe" ]; then
  log=$(mktemp)
  deploy/guest/build-kernel.sh --prepare >"$log" 2>&1 ||
    { echo "fresh: the guest's kernel cannot be built: $(tail -n 3 "$log")" >&2; exit 1; }
  touch "$FRESH_BUILD/kernel-$recipe"
fi
out=$(mktemp -d)
deploy/payload.sh "$SANDPOD_BIN" "$SANDPOD_GUEST_OWN" "$SANDPOD_VIRTIOFSD" "$out/payload"
SANDPOD_PAYLOAD=$out/payload SANDPOD_IMAGES=$out/images
export SANDPOD_PAYLOAD SANDPOD_IMAGES
deploy/release/licences.sh "$SANDPOD_PAYLOAD" "$SANDPOD_VIRTIOFSD" "$out/licences"
deploy/images.sh "$SANDPOD_BIN" "$SANDPOD_PAYLOAD" "$SANDPOD_IMAGES" "$out/licences"
deploy/release/release.sh "$SANDPOD_BIN" "$SANDPOD_PAYLOAD" "$SANDPOD_IMAGES" "$out/licences" "$SANDPOD_VIRTIOFSD" \
  "$out/release"
cargo test --offline --release --quiet --workspace --test cluster -- --test-threads=1 life/
