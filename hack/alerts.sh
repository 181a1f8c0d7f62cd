#!/usr/bin/env bash
# `make alerts`: checks the alert rules and runs their tests, with promtool built by Go from e2e/tools/promtool.
# Not a part of `make test`: promtool links Prometheus with all its service discoveries, which takes minutes to build.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
DIR=$CACHE/tools/promtool-$(cat "$ROOT/e2e/tools/promtool/go.mod" "$ROOT/e2e/tools/promtool/go.sum" | sha256sum | cut -c1-16)
if [ ! -x "$DIR/promtool" ]; then
    require_go
    say "building promtool (minutes on two cores, once)"
    mkdir -p "$CACHE/tools"
    exec 9>"$CACHE/tools/.lock"
    flock 9
    [ -x "$DIR/promtool" ] ||
        (cd "$ROOT/e2e/tools/promtool" && CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly \
            go build -trimpath -ldflags "-s -w" -o "$DIR/promtool" github.com/prometheus/prometheus/cmd/promtool) ||
        fail "promtool could not be built, the compiler's last words are above: check the network (Go modules) and the free space in $CACHE, then try again."
    flock -u 9
fi
cd "$ROOT/manifests/components/alerts"
"$DIR/promtool" check rules rules.yaml
exec "$DIR/promtool" test rules rules_test.yaml
