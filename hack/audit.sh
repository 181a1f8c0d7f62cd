#!/usr/bin/env bash
# `make audit`: checks licences, bans and sources of all dependencies with cargo-deny and deny.toml.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_cargo
VERSION=0.20.2
# Without optimizations it builds in half the time, and still checks in seconds.
TOOLS=$CACHE/tools/cargo-deny-$VERSION-debug
if [ ! -x "$TOOLS/bin/cargo-deny" ]; then
    say "building cargo-deny $VERSION (a few minutes on two cores, once)"
    mkdir -p "$CACHE/tools"
    exec 9>"$CACHE/tools/.lock"
    flock 9
    [ -x "$TOOLS/bin/cargo-deny" ] ||
        (cd / && CARGO_TARGET_DIR=$CACHE/tools/build cargo install --debug cargo-deny --version "$VERSION" --locked --root "$TOOLS") ||
        fail "cargo-deny could not be built: check the network (crates.io) and the C compiler, then retry."
    rm -rf "$CACHE/tools/build"
    flock -u 9
fi
cd "$ROOT"
exec "$TOOLS/bin/cargo-deny" --all-features --locked check licenses bans sources
