#!/usr/bin/env bash
# `make chaos`: every fault of docs/reliability.md on a real API server and kernels, under continuous traffic. Prints the
# table of that page.
#
#   hack/chaos.sh [ROUNDS] [SEED]      each round takes about seven minutes
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root chaos
"$ROOT/hack/setup.sh" chaos
install_packages faketime=faketime
cd "$ROOT"
build_workspace_binaries ""
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
SWITCHTOWER_CHAOS_ROUNDS=${1:-1}
SWITCHTOWER_CHAOS_SEED=${2:-1}
export SWITCHTOWER_CONTROL_PLANE SWITCHTOWER_CHAOS_ROUNDS SWITCHTOWER_CHAOS_SEED
exec cargo test --locked --quiet -p switchtower-e2e --test chaos -- --nocapture
