#!/usr/bin/env bash
# `make test`: format, lints, then every test of the workspace. The last line is the total:
#   N passed, N failed
# A test binary that dies, and with CI set an ignored test, count as failed.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root test
"$ROOT/hack/setup.sh" test
require_lint_tools
install_packages shellcheck=shellcheck
cd "$ROOT"

failed=0
passed=0
log=$(mktemp)
beside=$(mktemp)
# What the last rung needs is built with the processor time that the rest leaves over; its log is shown only there.
nice -n 19 hack/cluster-setup.sh test >"$beside" 2>&1 &
beside_pid=$!
trap 'kill "$beside_pid" 2>/dev/null || true; rm -f "$log" "$beside"' EXIT

total() {
    printf '%s passed, %s failed\n' "$passed" "$failed"
}

say "format"
cargo fmt --all --check || {
    failed=1
    echo "switchtower: the format differs: run 'cargo fmt --all'." >&2
    total
    exit 1
}
say "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings || {
    failed=1
    echo "switchtower: clippy found something, see above." >&2
    total
    exit 1
}
say "shell scripts"
shellcheck --external-sources hack/*.sh .ci/run || {
    failed=1
    total
    exit 1
}
say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items || {
    failed=1
    total
    exit 1
}
build_workspace_binaries ""
say "building the tests"
cargo test --locked --workspace --no-run || {
    failed=1
    total
    exit 1
}

SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE
SWITCHTOWER_TOOL_OTELCOL=$(tool_dir otelcol)/otelcol
SWITCHTOWER_TOOL_PROMTOOL=$(tool_dir promtool)/promtool
export SWITCHTOWER_TOOL_OTELCOL SWITCHTOWER_TOOL_PROMTOOL
say "tests"
status=0
cargo test --locked --workspace --no-fail-fast -- "$@" 2>&1 | tee "$log" || status=$?

read -r passed failed ignored < <(awk '
    /^test result: / {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) == "passed;") passed += $i
            if ($(i + 1) == "failed;") failed += $i
            if ($(i + 1) == "ignored;") ignored += $i
        }
    }
    END { print passed + 0, failed + 0, ignored + 0 }' "$log")
# A binary that was started and gave no result died.
started=$(grep -cE '^ +(Running|Doc-tests) ' "$log" || true)
finished=$(grep -c '^test result: ' "$log" || true)
if ((started > finished)); then
    say "$((started - finished)) test binaries died before they gave a result"
    failed=$((failed + started - finished))
fi
if [ -n "${CI:-}" ] && ((ignored > 0)); then
    say "$ignored tests were ignored: in CI every test runs"
    failed=$((failed + ignored))
fi
# cargo says that something is wrong and the counts do not: trust cargo.
if ((status != 0 && failed == 0)); then
    failed=1
fi

# The last rung: kubelets, containers, the manifests, and upstream's own tests. Its numbers are part of the total.
if kill -0 "$beside_pid" 2>/dev/null; then
    say "waiting for the programs of a real cluster: $(tail -n 1 "$beside")"
fi
# If it failed, the cluster's own start tries again and tells why.
wait "$beside_pid" || true
# It is told to end when this script does, so that it removes its cluster.
read -r cluster_passed cluster_failed < <(exec setpriv --pdeathsig TERM hack/cluster-test.sh) || true
passed=$((passed + ${cluster_passed:-0}))
failed=$((failed + ${cluster_failed:-1}))
total
((failed == 0))
