#!/usr/bin/env bash
# `make audit`: checks licences, bans and sources of all dependencies with cargo-deny and deny.toml.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_cargo
VERSION=0.20.2
# Without optimizations it builds in half the time, and still checks in seconds.
TOOLS=$CACHE/tools/cargo-deny-$VERSION-debug
install_cargo_tool cargo-deny "$VERSION" "$TOOLS"
cd "$ROOT"
exec "$TOOLS/bin/cargo-deny" --all-features --locked check licenses bans sources
