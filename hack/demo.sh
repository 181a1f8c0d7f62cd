#!/usr/bin/env bash
# `make demo`: installs requirements, builds, and runs the demo. KEEP=1 keeps it running, SVG=FILE also writes its
# output as an image.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root demo
"$ROOT/hack/setup.sh" demo
cd "$ROOT"
build_workspace_binaries ""
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE
arguments=()
[ -z "${SVG:-}" ] || arguments+=(--svg "$SVG")
[ -z "${KEEP:-}" ] || [ "$KEEP" = 0 ] || arguments+=(--keep)
exec "$(target_dir)/debug/demo" "${arguments[@]}"
