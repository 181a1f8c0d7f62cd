#!/usr/bin/env bash
# The part of `make test` that needs a real cluster: interrupts the start of clusters, starts one, installs the manifests,
# runs a part of upstream's tests, checks the installation, runs the kubectl plugin and agent faults, uninstalls and
# reinstalls, and removes the cluster. Prints two numbers: passed and failed.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
# Fewer upstream tests indicate that the filter no longer matches.
LEAST=15

export SWITCHTOWER_CLUSTER_NAME=sttest
CLUSTER=${SWITCHTOWER_CLUSTER_DIR:-/var/lib/switchtower-cluster}/$SWITCHTOWER_CLUSTER_NAME
reports=$(mktemp -d)
trap 'hack/cluster.sh down >&2 || true; rm -rf "$reports"' EXIT

# Lists remains of the cluster, one per line: namespaces, links, control groups, the folder, processes.
leftovers() {
    ip netns list | grep "^$SWITCHTOWER_CLUSTER_NAME-" || true
    ip -oneline link show | grep " $SWITCHTOWER_CLUSTER_NAME-" || true
    find /sys/fs/cgroup -maxdepth 3 -type d -path "*/switchtower-cluster/$SWITCHTOWER_CLUSTER_NAME" 2>/dev/null || true
    ls -d "$CLUSTER" 2>/dev/null || true
    pgrep --list-full --full "machine-init --host-name $SWITCHTOWER_CLUSTER_NAME-" || true
}

passed=0
failed=0
hack/cluster.sh down >&2 || true
say "interrupted starts of a real cluster"
hack/cluster.sh prepare >&2
for signal in INT TERM; do
    began=""
    for seconds in 5 10 20 40; do
        (until [ -e "$CLUSTER/starter" ]; do sleep 0.1; done; touch "$reports/began-$signal") &
        watcher=$!
        # `timeout` returns 124 if it sent the signal, i.e. if the start was interrupted.
        status=0
        timeout --signal="$signal" "$seconds" hack/cluster.sh up >&2 || status=$?
        kill "$watcher" 2>/dev/null || true
        # The start had not created anything yet: repeat with more time.
        [ ! -e "$reports/began-$signal" ] || { began=yes; break; }
    done
    left=$(leftovers)
    if [ -n "$began" ] && ((status == 124)) && [ -z "$left" ]; then
        passed=$((passed + 1))
    else
        say "a start that got SIG$signal after $seconds s (begun: ${began:-no}) ended with $status and left: ${left:-nothing}"
        failed=$((failed + 1))
    fi
done
say "upstream's tests on a real cluster"
if ! { hack/cluster.sh up && hack/cluster.sh install; } >&2; then
    say "the cluster did not start: none of its tests ran"
    echo "$passed $((failed + 1))"
    exit 1
fi
# Their exit status adds no information to the counts.
hack/cluster.sh conformance --part small --label test --out "$reports" >&2 || true
# "| test | 20 | 0 | 0 |"
read -r some_passed some_failed < <(awk -F'|' '
    $2 == " test " && $3 ~ /^ [0-9]+ $/ { found = 1; print $3 + 0, $4 + 0 }
    END { if (!found) print 0, 1 }' "$reports/test-small.md" || echo "0 1")
if ((some_passed < LEAST && some_failed == 0)); then
    say "only $some_passed of upstream's tests ran"
    some_failed=1
fi
passed=$((passed + some_passed))
failed=$((failed + some_failed))
for part in installed plugin faults uninstall; do
    hack/cluster.sh "$part" >"$reports/$part" || true
    cat "$reports/$part" >&2
    # "faults: 4 passed, 0 failed"
    read -r some_passed some_failed < <(awk -v label="$part:" '
        $1 == label { found = 1; print $2 + 0, $4 + 0 }
        END { if (!found) print 0, 1 }' "$reports/$part")
    passed=$((passed + some_passed))
    failed=$((failed + some_failed))
done
echo "$passed $failed"
((failed == 0))
