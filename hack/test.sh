#!/usr/bin/env bash
# `make test`: checks format and lints, then runs all tests of the workspace. The last line is the total:
#   N passed, N failed
# Crashed test binaries count as failed, and so do ignored tests if CI is set.
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
cluster_log=$(mktemp)
# Build the programs of the cluster tests in the background, with idle CPU time.
nice -n 19 hack/cluster-setup.sh test >"$cluster_log" 2>&1 &
cluster_pid=$!
# Building cargo-deny and cargo-cyclonedx takes minutes the first time; the check itself takes seconds.
audit_log=$(mktemp)
nice -n 19 bash -c '. hack/lib.sh; hack/audit.sh && build_cyclonedx' >"$audit_log" 2>&1 &
audit_pid=$!
trap 'kill "$cluster_pid" "$audit_pid" "${checks_pid:-}" "${release_pid:-}" 2>/dev/null || true
      rm -f "$log" "$cluster_log" "$audit_log" "${checks_log:-}" "${release_log:-}"' EXIT

total() {
    printf '%s passed, %s failed\n' "$passed" "$failed"
}

# Names of failed checks other than Cargo's tests.
other_failures=()

# Cargo prints the names below `failures:` of each test binary; they are easily lost in a long log.
report_failures() {
    ((${#other_failures[@]} == 0)) || printf 'failed: %s\n' "${other_failures[@]}"
    awk '/^ +(Running|Doc-tests) / { binary = $2 == "unittests" ? $4 : $NF; gsub(/[()]/, "", binary); sub(".*/", "", binary) }
         /^test .* \.\.\. FAILED/ { print "failed: " binary ": " $2 }' "$log"
}

say "format"
cargo fmt --all --check || {
    failed=1
    echo "switchtower: format differs: run 'cargo fmt --all'." >&2
    total
    exit 1
}
say "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings || {
    failed=1
    echo "switchtower: clippy found problems, see above." >&2
    total
    exit 1
}
say "shell scripts"
shellcheck --external-sources hack/*.sh .ci/run || {
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

# The files of a release, which tests inspect, and its images a second time, to compare them.
release_log=$(mktemp)
{
    nice -n 19 hack/release.sh --dry-run --registry registry.example/st "$(target_dir)/release-dry-run" &&
        nice -n 19 hack/images.sh --relink --tag "v$(project_version)" "$(target_dir)/images-again"
} >"$release_log" 2>&1 &
release_pid=$!
# In a target directory of its own, because Cargo locks the other one. Most tests wait rather than compute.
checks_log=$(mktemp)
nice -n 19 hack/crates.sh >"$checks_log" 2>&1 &
checks_pid=$!

SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE
SWITCHTOWER_TOOL_OTELCOL=$(tool_dir otelcol)/otelcol
SWITCHTOWER_TOOL_PROMTOOL=$(tool_dir promtool)/promtool
SWITCHTOWER_TOOL_HELM=$(tool_dir helm)/helm
export SWITCHTOWER_TOOL_OTELCOL SWITCHTOWER_TOOL_PROMTOOL SWITCHTOWER_TOOL_HELM
say "tests"
status=0
cargo test --locked --workspace --no-fail-fast -- "$@" 2>&1 | tee "$log" || status=$?
say "files of a release"
if wait "$release_pid"; then
    cargo test --locked --workspace --test release --no-fail-fast -- "$@" 2>&1 | tee -a "$log" || status=$?
else
    cat "$release_log" >&2
    other_failures+=("the build of a release's files")
fi

read -r passed failed ignored < <(awk '
    /^test result: / {
        for (i = 1; i < NF; i++) {
            if ($(i + 1) == "passed;") passed += $i
            if ($(i + 1) == "failed;") failed += $i
            if ($(i + 1) == "ignored;") ignored += $i
        }
    }
    END { print passed + 0, failed + 0, ignored + 0 }' "$log")
# A test binary without a result has crashed.
started=$(grep -cE '^ +(Running|Doc-tests) ' "$log" || true)
finished=$(grep -c '^test result: ' "$log" || true)
if ((started > finished)); then
    other_failures+=("$((started - finished)) test binaries crashed")
fi
if [ -n "${CI:-}" ] && ((ignored > 0)); then
    say "$ignored ignored tests, which CI does not allow"
    failed=$((failed + ignored))
fi
# cargo failed although the counts show no failure.
if ((status != 0 && failed + ${#other_failures[@]} == 0)); then
    failed=1
fi

say "licences, bans and sources of dependencies"
wait "$audit_pid" || {
    cat "$audit_log" >&2
    other_failures+=("licences, bans and sources of dependencies")
}

say "documentation, and each crate alone"
wait "$checks_pid" || {
    cat "$checks_log" >&2
    other_failures+=("documentation, or a crate alone")
}

# Cluster tests: kubelets, containers, manifests, and upstream's tests. Their results are part of the total.
if kill -0 "$cluster_pid" 2>/dev/null; then
    say "waiting for the programs of the cluster tests: $(tail -n 1 "$cluster_log")"
fi
# After a failure the start of the cluster retries and reports the reason.
wait "$cluster_pid" || true
# Terminate it together with this script, so that it removes its cluster.
read -r cluster_passed cluster_failed < <(exec setpriv --pdeathsig TERM hack/cluster-test.sh) || true
passed=$((passed + ${cluster_passed:-0}))
failed=$((failed + ${cluster_failed:-1} + ${#other_failures[@]}))
((${cluster_failed:-1} == 0)) || other_failures+=("${cluster_failed:-1} tests of the real cluster, see above")
report_failures
total
((failed == 0))
