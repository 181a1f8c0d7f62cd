#!/usr/bin/env bash
# Checks the documentation without warnings, and each crate alone: in the workspace, a crate can use a feature of a
# dependency that only another crate enables. Part of `make test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=$PWD/target/crates
# No crate is published: the documentation has private items, so links to them work.
RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --locked --workspace --no-deps --document-private-items
cargo tree --locked --workspace --depth 0 --prefix none --format '{p}' | awk 'NF { print $1 }' | sort -u |
    while read -r package; do
        echo "==> $package alone"
        cargo check --locked --package "$package"
    done
