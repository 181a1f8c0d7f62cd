#!/usr/bin/env bash
# Removes network namespaces of test environments whose process no longer runs.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root clean-lab
require_cargo
cd "$ROOT"
# Use an existing build, or build the whole workspace: a single package would recompile its dependencies with different
# features.
[ -x "$(target_dir)/debug/demo" ] || build_workspace_binaries ""
exec "$(target_dir)/debug/demo" --sweep
