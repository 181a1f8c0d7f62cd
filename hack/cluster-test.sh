#!/usr/bin/env bash
# The part of `make test` that needs a real cluster: starts one, installs the manifests on it, runs a part of
# upstream's tests, looks at what is installed, runs the kubectl plugin and the faults of agents, and removes it.
# Standard output is two numbers: passed and failed.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
# Fewer of upstream's tests than this means that the filter fits nothing any more.
LEAST=15

export SWITCHTOWER_CLUSTER_NAME=sttest
reports=$(mktemp -d)
trap 'hack/cluster.sh down >&2 || true; rm -rf "$reports"' EXIT

say "upstream's tests on a real cluster"
if ! { hack/cluster.sh down && hack/cluster.sh up && hack/cluster.sh install; } >&2; then
    say "the cluster did not start: none of its tests ran"
    echo "0 1"
    exit 1
fi
passed=0
failed=0
# Their exit status says no more than their counts.
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
for part in installed plugin faults; do
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
