#!/usr/bin/env bash
# `make alerts`: checks the alert rules and runs their tests with promtool, built by Go from e2e/tools/promtool. Also
# part of `make test`.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
build_promtool
PROMTOOL=$(tool_dir promtool)/promtool
cd "$ROOT/manifests/components/alerts"
"$PROMTOOL" check rules rules.yaml
exec "$PROMTOOL" test rules rules_test.yaml
