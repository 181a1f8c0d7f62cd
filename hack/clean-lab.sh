#!/usr/bin/env bash
# Removes the network namespaces of laboratories whose process is gone. Those of running ones stay.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root clean-lab
require_cargo
cd "$ROOT"
exec cargo run -q -p switchtower-e2e --bin demo -- --sweep
