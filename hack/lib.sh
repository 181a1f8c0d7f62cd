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

# The same for what a real cluster needs beside the control plane.
cluster_tools_dir() {
    local key
    key=$(cat "$ROOT"/e2e/tools/{coredns,kubernetes}/go.mod "$ROOT"/e2e/tools/{coredns,kubernetes}/go.sum "$ROOT/hack/cluster-setup.sh" "$ROOT/e2e/tools/pause/pause.c" | sha256sum | cut -c1-16)
    printf '%s/cluster/%s' "$CACHE" "$key"
}

# A program that is built from a folder of e2e/tools. Argument: the folder's name, which is the program's too.
tool_dir() {
    local key
    # A tool may be another module's program, without a file of its own.
    key=$(cd "$ROOT/e2e/tools/$1" && find . -maxdepth 1 \( -name 'go.*' -o -name '*.go' \) | sort | xargs cat | sha256sum | cut -c1-16)
    printf '%s/tools/%s-%s' "$CACHE" "$1" "$key"
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

# Runs a command that ends when this script is told to, even if only the script is told.
run_to_the_end() {
    local pid
    "$@" &
    pid=$!
    # The number is written into the trap: when it runs, the function's variables are gone.
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null || true; exit 130" INT TERM HUP
    wait "$pid" || { trap - INT TERM HUP; return 1; }
    trap - INT TERM HUP
}

# The programs that the laboratory starts. cargo says what it compiles; nothing if all is fresh.
# Argument: the profile's flag (--release), or empty.
build_workspace_binaries() {
    say "building switchtower (cargo says what it compiles; minutes the first time, seconds later)"
    run_to_the_end cargo build --locked --workspace --bins ${1:+"$1"} ||
        fail "cargo could not build the workspace, the compiler's words are above."
}

# Installs the package of every command that is missing. Arguments: command=package ...
install_packages() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair##*=}")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null 2>&1 ||
        fail "missing: ${missing[*]}; apt-get was not found, so install these packages by hand and try again."
    say "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # A mirror may fail once, and a machine that has just started holds apt's lock for its own updates.
    local options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
    apt-get update "${options[@]}" >/dev/null ||
        fail "'apt-get update' failed: check the network and /etc/apt/sources.list, then try again."
    apt-get install -y "${options[@]}" --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install ${missing[*]}: run 'apt-get install ${missing[*]}' to see why."
}

require_go() {
    local want have
    want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' "$ROOT/e2e/go.mod")
    command -v go >/dev/null 2>&1 ||
        fail "go was not found and programs have to be built: install Go ${want%.*} (https://go.dev/dl) and put it into PATH."
    have=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
    have=${have#go}
    [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -1)" = "$want" ] ||
        fail "Go $have is too old: install Go ${want%.*} or later (https://go.dev/dl) and put it first in PATH."
}

# Fetches the Go modules that packages need, with a second and a third try: one failed request would end a build.
# Arguments: the module's folder, then what `go list` takes.
fetch_modules() {
    local folder=$1 try errors
    shift
    for try in 1 2 3; do
        errors=$(cd "$folder" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly go list -deps "$@" 2>&1 >/dev/null) &&
            return 0
        tail -n 3 <<<"$errors" >&2
        say "fetching Go modules failed (try $try of 3)"
        sleep $((try * 5))
    done
    fail "the Go modules of ${folder#"$ROOT"/} could not be fetched, Go's words are above: check the network (GOPROXY) and try again."
}

# promtool links Prometheus; its service discoveries are left out, they are most of the build.
build_promtool() {
    build_tool promtool "two minutes" github.com/prometheus/prometheus/cmd/promtool remove_all_sd
}

# A program of e2e/tools, if it is not built yet. Arguments: its folder, how long it takes, its Go package, build tags.
build_tool() {
    local name=$1 takes=$2 package=${3:-.} tags=${4:-} dir work
    dir=$(tool_dir "$name")
    [ ! -x "$dir/$name" ] || return 0
    require_go
    mkdir -p "$CACHE/tools"
    exec 9>"$CACHE/tools/.lock"
    flock -n 9 || { say "waiting for another run that builds tools"; flock 9; }
    [ ! -x "$dir/$name" ] || { flock -u 9; return 0; }
    say "building $name ($takes on two cores, once)"
    work=$(mktemp -d "$CACHE/tools/.build.XXXXXX")
    fetch_modules "$ROOT/e2e/tools/$name" -tags "$tags" "$package"
    # Without the stamp of the repository: git refuses to read a checkout of another owner, and go with it.
    (cd "$ROOT/e2e/tools/$name" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly \
        go build -buildvcs=false -tags "$tags" -trimpath -ldflags "-s -w" -o "$work/$name" "$package") ||
        fail "$name could not be built, the compiler's last words are above: check the network (Go modules) and the free space in $CACHE, then try again."
    chmod 755 "$work"
    rm -rf "$dir"
    mv "$work" "$dir"
    flock -u 9
}
