#!/usr/bin/env bash
# Installs missing requirements of demo, test and bench: Debian packages, the control plane (etcd, kube-apiserver,
# kube-controller-manager, kubectl, kube-proxy, built by Go from e2e/go.mod) and, for tests, the OpenTelemetry
# Collector, promtool and helm (from e2e/tools), buildah and skopeo. Programs are cached for later runs. Then checks the
# features of the kernel.
#
#   hack/setup.sh [TARGET]      TARGET is the calling make target; only `test` and `setup` build the tools
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TARGET=${1:-setup}

# For a CI cache: saving this folder under this key avoids building the control plane on a new machine.
if [ "$TARGET" = cache-key ]; then
    dir=$(control_plane_dir)
    printf 'key\t%s\nfolder\t%s\n' "switchtower-control-plane-$(uname -m)-$(basename "$dir")" "$dir"
    exit 0
fi

# Tests each feature in temporary namespaces, independent of version numbers.
probe_kernel() {
    local name="stprobe-$$" error
    trap 'ip netns del "'"$name"'" 2>/dev/null || true; ip netns del "'"$name"'-b" 2>/dev/null || true' EXIT
    error=$( (ip netns add "$name" && ip netns add "$name-b") 2>&1) ||
        fail "this machine cannot create network namespaces ($error): run on a machine or container with CAP_SYS_ADMIN."
    error=$(ip -n "$name" link add st0 type veth peer name st1 netns "$name-b" 2>&1) ||
        fail "the kernel has no veth devices ($error): load the module (modprobe veth) or use a kernel with CONFIG_VETH."
    error=$(ip -n "$name" link add br0 type bridge 2>&1) ||
        fail "the kernel has no bridge devices ($error): load the module (modprobe bridge) or use a kernel with CONFIG_BRIDGE."
    error=$(printf '%s\n' 'table ip st { map m { type ipv4_addr . inet_proto . inet_service : mark; };' \
        'chain c { type nat hook prerouting priority -100; ct state new meta l4proto tcp dnat to 192.0.2.1:80; };' \
        'chain p { type nat hook postrouting priority 100; masquerade fully-random; };' \
        'chain f { type filter hook input priority 0; reject; }; }' 'table ip6 st { }' |
        ip netns exec "$name" nft -f - 2>&1) ||
        fail "the kernel lacks nf_tables with NAT and connection tracking (${error%%$'\n'*}): use a kernel with CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_REJECT and CONFIG_NF_CONNTRACK (modprobe nf_tables nft_nat nft_masq nft_reject_ipv4 nf_conntrack)."
    error=$(ip netns exec "$name" conntrack -L 2>&1 >/dev/null | grep -v 'flow entries have been shown' || true)
    [ -z "$error" ] ||
        fail "the kernel's connection tracking cannot be read (${error%%$'\n'*}): use a kernel with CONFIG_NF_CT_NETLINK (modprobe nf_conntrack_netlink)."
    error=$(ip -n "$name" addr add fd00:2001:db8::1/64 dev st0 nodad 2>&1) ||
        fail "a new network namespace has no IPv6 ($error): boot with ipv6.disable=0, and set net.ipv6.conf.default.disable_ipv6=0 where the namespace takes it from."
    error=$(ip netns exec "$name" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward' 2>&1) ||
        fail "the sysctls of a network namespace cannot be set ($error): run where /proc/sys is writable (docker: --privileged)."
    ip netns del "$name-b"
    ip netns del "$name"
    trap - EXIT
}

complete() {
    local program
    for program in etcd kube-apiserver kube-controller-manager kube-proxy kubectl; do
        [ -x "$1/$program" ] || return 1
    done
}

# Runs the build in the background and reports progress.
go_build() {
    local out=$1 log=$2 total compiled start=$SECONDS pid
    local packages=(
        k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kube-controller-manager
        k8s.io/kubernetes/cmd/kube-proxy k8s.io/kubernetes/cmd/kubectl go.etcd.io/etcd/server/v3
    )
    local version=k8s.io/component-base/version
    say "downloading the Go modules of Kubernetes $KUBERNETES_VERSION and etcd"
    (fetch_modules "$ROOT/e2e" "${packages[@]}") || return 1
    cd "$ROOT/e2e"
    export CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly
    total=$(go list -deps "${packages[@]}" 2>"$log" | wc -l) || { tail -5 "$log" >&2; return 1; }
    say "building the control plane: up to $total packages, about five minutes on two cores, once"
    go build -v -trimpath -buildvcs=false -o "$out/" \
        -ldflags "-s -w -X $version.gitVersion=$KUBERNETES_VERSION -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES_VERSION")" \
        "${packages[@]}" >"$log" 2>&1 &
    pid=$!
    # Stop the compiler if the script is interrupted.
    # Expand now: the variable is out of scope when the trap runs.
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null || true" EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if (((SECONDS - start) % 15 == 0)); then
            compiled=$(wc -l <"$log")
            say "  control plane: $compiled of at most $total packages compiled, $((SECONDS - start)) s"
        fi
    done
    wait "$pid" || { tail -20 "$log" >&2; return 1; }
    mv "$out/server" "$out/etcd"
    say "the control plane is built ($((SECONDS - start)) s)"
}

build_control_plane() {
    local dir work
    dir=$(control_plane_dir)
    complete "$dir" && return 0
    require_go
    mkdir -p "$CACHE/control-plane"
    # Of two concurrent runs the second one waits and uses the result.
    exec 9>"$CACHE/control-plane/.lock"
    flock -n 9 || { say "waiting for another run to build the control plane"; flock 9; }
    complete "$dir" && return 0
    # Leftovers of interrupted builds; safe because this run holds the lock.
    rm -rf "$CACHE/control-plane"/.build.*
    work=$(mktemp -d "$CACHE/control-plane/.build.XXXXXX")
    (go_build "$work" "$work/build.log") ||
        fail "the control plane could not be built; see the errors above. Check the network (Go modules) and the free space in $CACHE, then retry."
    complete "$work" ||
        fail "the build of the control plane is incomplete: run 'go clean -cache' and retry."
    rm -f "$work/build.log"
    chmod 755 "$work"
    rm -rf "$dir"
    mv "$work" "$dir"
    flock -u 9
}

require_root "$TARGET"
require_cargo
install_packages ip=iproute2 nft=nftables conntrack=conntrack curl=curl cc=gcc ld=binutils flock=util-linux
# `cc` does not include the headers of the C library, which crates with C code need.
[ -e /usr/include/stdlib.h ] || install_packages "no-such-command=libc6-dev"
[ -e /etc/ssl/certs/ca-certificates.crt ] || install_packages "no-such-command=ca-certificates"
probe_kernel
build_control_plane
case "$TARGET" in
test | setup)
    build_tool otelcol "about a minute"
    build_promtool
    build_helm
    install_packages buildah=buildah skopeo=skopeo systemd-analyze=systemd iptables-legacy=iptables faketime=faketime
    ;;
bench) install_packages iptables-legacy=iptables ;;
esac
