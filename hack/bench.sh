#!/usr/bin/env bash
# `make bench`: compares performance with the real kube-proxy on the same API server. Release build.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root bench
"$ROOT/hack/setup.sh" bench
cd "$ROOT"
build_workspace_binaries --release
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE
exec "$(target_dir)/release/bench" "$@"
