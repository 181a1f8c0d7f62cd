#!/usr/bin/env bash
# Removes the network namespaces of laboratories whose process is gone. Those of running ones stay.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root clean-lab
require_cargo
cd "$ROOT"
# The program of an earlier build will do. If there is none: the whole workspace, because one package alone has its
# dependencies compiled again with other features.
[ -x "$(target_dir)/debug/demo" ] || build_workspace_binaries ""
exec "$(target_dir)/debug/demo" --sweep
