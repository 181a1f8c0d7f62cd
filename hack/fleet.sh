#!/usr/bin/env bash
# `make fleet`: the controller with thousands of hollow agents on a real API server. Release build.
#
#   hack/fleet.sh [--nodes 100,500,1000] [--rates 10,100] [--json FILE] ...      --help lists all
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root fleet
"$ROOT/hack/setup.sh" fleet
cd "$ROOT"
build_workspace_binaries --release
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE
exec "$(target_dir)/release/fleet" "$@"
