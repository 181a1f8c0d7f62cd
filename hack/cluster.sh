#!/usr/bin/env bash
# A real cluster on this machine: kubelets, containers, CoreDNS (`make cluster` and related targets).
#
#   hack/cluster.sh up|down|install|demo|drain|installed|plugin|faults|uninstall|helm|migrate|conformance [ARGUMENTS of the program `cluster`]
#   hack/cluster.sh prepare     only installs and builds requirements
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ACTION=${1:?use: hack/cluster.sh up|down|install|demo|drain|installed|plugin|faults|uninstall|helm|migrate|conformance}
shift
require_root cluster
if [ "$ACTION" = down ]; then
    # Uses existing programs: a removal must not start with a build.
    require_cargo
else
    "$ROOT/hack/cluster-setup.sh" cluster
fi
cd "$ROOT"
# The whole workspace: a single package would recompile its dependencies with different features.
if [ "$ACTION" != down ] || [ ! -x "$(target_dir)/debug/cluster" ]; then
    build_workspace_binaries ""
fi
case "$ACTION" in install | uninstall | helm | migrate) "$ROOT/hack/images.sh" "$(target_dir)/oci" ;; esac
if [ "$ACTION" = helm ]; then
    build_helm
    SWITCHTOWER_TOOL_HELM=$(tool_dir helm)/helm
    export SWITCHTOWER_TOOL_HELM
fi
SWITCHTOWER_IMAGES=$(target_dir)/oci/images
SWITCHTOWER_CONTROL_PLANE=$(control_plane_dir)
SWITCHTOWER_CLUSTER_TOOLS=$(cluster_tools_dir)
SWITCHTOWER_CLUSTER_IMAGES=$CACHE/cluster/images
SWITCHTOWER_MANIFESTS=$ROOT/manifests
[ "$ACTION" != prepare ] || exit 0
export SWITCHTOWER_CONTROL_PLANE SWITCHTOWER_CLUSTER_TOOLS SWITCHTOWER_CLUSTER_IMAGES SWITCHTOWER_MANIFESTS SWITCHTOWER_IMAGES
exec "$(target_dir)/debug/cluster" "$ACTION" "$@"
