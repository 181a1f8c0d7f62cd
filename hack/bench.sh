#!/usr/bin/env bash
# `make bench`: measures Switchtower, and the real kube-proxy in the same run. Release build. Prints Markdown.
#
#   hack/bench.sh [PART] [OPTION ...]      PART: node (default), packets, growth, fleet, micro or all; --help after a part
#                                          lists its options
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root bench
PART=${1:-node}
shift || true
case "$PART" in
node | packets | growth | fleet | micro | all) ;;
*) fail "unknown part '$PART': use node, packets, growth, fleet, micro or all." ;;
esac
"$ROOT/hack/setup.sh" bench
cd "$ROOT"
build_workspace_binaries --release
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
export SWITCHTOWER_CONTROL_PLANE

describe_machine() {
    local model
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
    printf '%s %s; kernel %s; kube-proxy %s; %s; load average %s\n\n' "$(nproc)" "${model:-processors}" "$(uname -r)" \
        "$KUBERNETES_VERSION" "$("$(target_dir)/release/switchtower-controller" --version)" "$(cut -d' ' -f1-3 /proc/loadavg)"
}

run_part() {
    local part=$1
    shift
    printf '## %s\n\n' "$part"
    case "$part" in
    fleet) "$(target_dir)/release/fleet" "$@" ;;
    micro) cargo bench --locked -q -p switchtower-core --bench core -p switchtower-node-agent --bench agent -- "$@" ;;
    *) "$(target_dir)/release/bench" "$part" "$@" ;;
    esac
    echo
}

describe_machine
if [ "$PART" = all ]; then
    for part in node packets growth micro fleet; do run_part "$part"; done
else
    run_part "$PART" "$@"
fi
