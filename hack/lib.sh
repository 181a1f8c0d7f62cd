# shellcheck shell=bash disable=SC2034
# Shared by the scripts of this folder: messages, checks, and where things are kept.
# Sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/switchtower
# The release that e2e/go.mod pins, shown by the built programs as their version.
KUBERNETES_VERSION=$(sed -n 's|^[[:space:]]*k8s.io/kubernetes \(v[0-9.]*\).*|\1|p' "$ROOT/e2e/go.mod" | head -1)

say() { printf '==> %s\n' "$*" >&2; }

# One sentence that says what is wrong and what to do, and the end.
fail() {
    printf 'switchtower: %s\n' "$*" >&2
    exit 1
}

# Keyed by what the programs are built from: another go.mod is another folder.
control_plane_dir() {
    local key
    key=$(cat "$ROOT/e2e/go.mod" "$ROOT/e2e/go.sum" | sha256sum | cut -c1-16)
    printf '%s/control-plane/%s' "$CACHE" "$key"
}

require_root() {
    [ "$(id -u)" -eq 0 ] ||
        fail "this needs root, for network namespaces and nf_tables: run it again as root (sudo make ${1:-demo})."
}

require_cargo() {
    command -v cargo >/dev/null 2>&1 ||
        fail "cargo was not found: install Rust $(rust_version) or later (https://rustup.rs) and put it into PATH."
    cargo --version >/dev/null 2>&1 ||
        fail "cargo does not start: run 'rustup toolchain install stable --component rustfmt,clippy' and try again."
    # `|| true`: an unreadable version is not a reason to stop.
    local have want
    have=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
    want=$(rust_version)
    [ "$(printf '%s\n%s\n' "$want" "${have%%-*}" | sort -V | head -1)" = "$want" ] ||
        fail "Rust $have is too old: install $want or later ('rustup update stable')."
}

require_lint_tools() {
    cargo fmt --version >/dev/null 2>&1 ||
        fail "rustfmt is missing: run 'rustup component add rustfmt' and try again."
    cargo clippy --version >/dev/null 2>&1 ||
        fail "clippy is missing: run 'rustup component add clippy' and try again."
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }

target_dir() {
    local dir
    dir=${CARGO_TARGET_DIR:-$ROOT/target}
    printf '%s' "$dir"
}

# The programs that the laboratory starts. cargo says what it compiles; nothing if all is fresh.
# Argument: the profile's flag (--release), or empty.
build_workspace_binaries() {
    say "building switchtower (cargo says what it compiles; minutes the first time, seconds later)"
    cargo build --locked --workspace --bins ${1:+"$1"} ||
        fail "cargo could not build the workspace, the compiler's words are above."
}
