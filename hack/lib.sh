# shellcheck shell=bash disable=SC2034
# Shared functions of the scripts in this folder: messages, checks, cache folders.
# To be sourced.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/switchtower
# The release that e2e/go.mod pins, shown by the built programs as their version.
KUBERNETES_VERSION=$(sed -n 's|^[[:space:]]*k8s.io/kubernetes \(v[0-9.]*\).*|\1|p' "$ROOT/e2e/go.mod" | head -1)

CYCLONEDX_VERSION=0.5.9

say() { printf '==> %s\n' "$*" >&2; }

# Prints an error with its remedy and exits.
fail() {
    printf 'switchtower: %s\n' "$*" >&2
    exit 1
}

# The key covers the inputs of the build.
control_plane_dir() {
    local key
    key=$(cat "$ROOT/e2e/go.mod" "$ROOT/e2e/go.sum" | sha256sum | cut -c1-16)
    printf '%s/control-plane/%s' "$CACHE" "$key"
}

# Programs of a real cluster, in addition to the control plane.
cluster_tools_dir() {
    local key
    key=$(cat "$ROOT"/e2e/tools/{coredns,kubernetes}/go.mod "$ROOT"/e2e/tools/{coredns,kubernetes}/go.sum "$ROOT/hack/cluster-setup.sh" "$ROOT/e2e/tools/pause/pause.c" | sha256sum | cut -c1-16)
    printf '%s/cluster/%s' "$CACHE" "$key"
}

# Cache folder of a program in e2e/tools. Argument: the name of its folder and of the program.
tool_dir() {
    local key
    # A tool may be a program of another module, without its own source files.
    key=$(cd "$ROOT/e2e/tools/$1" && find . -maxdepth 1 \( -name 'go.*' -o -name '*.go' \) | sort | xargs cat | sha256sum | cut -c1-16)
    printf '%s/tools/%s-%s' "$CACHE" "$1" "$key"
}

require_root() {
    [ "$(id -u)" -eq 0 ] ||
        fail "root is required for network namespaces and nf_tables: run sudo make ${1:-demo}."
}

require_cargo() {
    command -v cargo >/dev/null 2>&1 ||
        fail "cargo not found: install Rust $(rust_version) or later (https://rustup.rs) and add it to PATH."
    cargo --version >/dev/null 2>&1 ||
        fail "cargo does not start: run 'rustup toolchain install stable --component rustfmt,clippy' and retry."
    # Ignore an unreadable version.
    local have want
    have=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
    want=$(rust_version)
    [ "$(printf '%s\n%s\n' "$want" "${have%%-*}" | sort -V | head -1)" = "$want" ] ||
        fail "Rust $have is too old: install $want or later ('rustup update stable')."
}

require_lint_tools() {
    cargo fmt --version >/dev/null 2>&1 ||
        fail "rustfmt is missing: run 'rustup component add rustfmt' and retry."
    cargo clippy --version >/dev/null 2>&1 ||
        fail "clippy is missing: run 'rustup component add clippy' and retry."
}

# The version of everything that a release contains.
project_version() { sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }

# Name of this machine's processor architecture in images.
host_arch() {
    case "$(uname -m)" in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) uname -m ;;
    esac
}

# Rust's target of an image architecture.
rust_target() {
    case "$1" in
    amd64) echo x86_64-unknown-linux-gnu ;;
    arm64) echo aarch64-unknown-linux-gnu ;;
    *) fail "no Rust target is known for the architecture $1; use amd64 or arm64." ;;
    esac
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }

target_dir() {
    local dir
    dir=${CARGO_TARGET_DIR:-$ROOT/target}
    printf '%s' "$dir"
}

# Runs a command and forwards termination signals to it.
run_to_the_end() {
    local pid
    "$@" &
    pid=$!
    # Expand now: the variable is out of scope when the trap runs.
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null || true; exit 130" INT TERM HUP
    wait "$pid" || { trap - INT TERM HUP; return 1; }
    trap - INT TERM HUP
}

# Builds the programs that the test environment starts.
# Argument: profile flag (--release), or empty.
build_workspace_binaries() {
    say "building switchtower (minutes the first time, then seconds)"
    run_to_the_end cargo build --locked --workspace --bins ${1:+"$1"} ||
        fail "cargo could not build the workspace; see the errors above."
}

# Installs the packages of missing commands. Arguments: command=package ...
install_packages() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair##*=}")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null 2>&1 ||
        fail "missing: ${missing[*]}; apt-get not found: install these packages manually and retry."
    say "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # A mirror may fail temporarily, and automatic updates may hold apt's lock.
    local options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
    apt-get update "${options[@]}" >/dev/null ||
        fail "'apt-get update' failed: check the network and /etc/apt/sources.list, then retry."
    apt-get install -y "${options[@]}" --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}: run 'apt-get install ${missing[*]}' for details."
}

require_go() {
    local want have
    want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' "$ROOT/e2e/go.mod")
    command -v go >/dev/null 2>&1 ||
        fail "go not found: install Go ${want%.*} (https://go.dev/dl) and add it to PATH."
    have=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
    have=${have#go}
    [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -1)" = "$want" ] ||
        fail "Go $have is too old: install Go ${want%.*} or later (https://go.dev/dl) and add it to the start of PATH."
}

# Downloads the Go modules of packages, with up to three attempts.
# Arguments: folder of the module, then arguments of `go list`.
fetch_modules() {
    local folder=$1 try errors
    shift
    for try in 1 2 3; do
        errors=$(cd "$folder" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly go list -deps "$@" 2>&1 >/dev/null) &&
            return 0
        tail -n 3 <<<"$errors" >&2
        say "downloading Go modules failed (attempt $try of 3)"
        sleep $((try * 5))
    done
    fail "the Go modules of ${folder#"$ROOT"/} could not be downloaded; see the errors above. Check the network (GOPROXY) and retry."
}

# Without service discoveries, which make up most of the build.
build_promtool() {
    build_tool promtool "two minutes" github.com/prometheus/prometheus/cmd/promtool remove_all_sd
}

build_helm() {
    build_tool helm "a minute" helm.sh/helm/v4/cmd/helm
}

# Builds a program of e2e/tools if it is not cached. Arguments: folder, expected duration, Go package, build tags.
build_tool() {
    local name=$1 takes=$2 package=${3:-.} tags=${4:-} dir work
    dir=$(tool_dir "$name")
    [ ! -x "$dir/$name" ] || return 0
    require_go
    mkdir -p "$CACHE/tools"
    exec 9>"$CACHE/tools/.lock"
    flock -n 9 || { say "waiting for another run to build tools"; flock 9; }
    [ ! -x "$dir/$name" ] || { flock -u 9; return 0; }
    say "building $name ($takes on two cores, once)"
    work=$(mktemp -d "$CACHE/tools/.build.XXXXXX")
    fetch_modules "$ROOT/e2e/tools/$name" -tags "$tags" "$package"
    # Without VCS stamp: git, and therefore go, rejects a checkout of another owner.
    (cd "$ROOT/e2e/tools/$name" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly \
        go build -buildvcs=false -tags "$tags" -trimpath -ldflags "-s -w" -o "$work/$name" "$package") ||
        fail "$name could not be built; see the errors above. Check the network (Go modules) and the free space in $CACHE, then retry."
    chmod 755 "$work"
    rm -rf "$dir"
    mv "$work" "$dir"
    flock -u 9
}

# Installs a program from crates.io if it is not cached. Arguments: crate, version, folder.
install_cargo_tool() {
    local crate=$1 version=$2 tools=$3
    [ ! -x "$tools/bin/$crate" ] || return 0
    say "building $crate $version (a few minutes on two cores, once)"
    mkdir -p "$CACHE/tools"
    exec 9>"$CACHE/tools/.lock"
    flock 9
    [ -x "$tools/bin/$crate" ] ||
        (cd / && CARGO_TARGET_DIR=$CACHE/tools/build cargo install --debug "$crate" --version "$version" --locked --root "$tools") ||
        fail "$crate could not be built: check the network (crates.io) and the C compiler, then retry."
    rm -rf "$CACHE/tools/build"
    flock -u 9
}

cyclonedx_dir() { printf '%s/tools/cargo-cyclonedx-%s-debug' "$CACHE" "$CYCLONEDX_VERSION"; }

# The generator of SBOMs.
build_cyclonedx() { install_cargo_tool cargo-cyclonedx "$CYCLONEDX_VERSION" "$(cyclonedx_dir)"; }
