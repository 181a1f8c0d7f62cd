#!/usr/bin/env bash
# Installs missing requirements of a real cluster, in addition to hack/setup.sh: Debian's containerd,
# runc and CNI plugins; kubelet, kube-scheduler, agnhost, upstream's e2e suite, ginkgo and CoreDNS, built by
# Go from e2e/tools/*/go.mod; the sandbox's pause program and the files of the test image.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
TARGET=${1:-cluster}

complete() {
    local file
    for file in kubelet kube-scheduler agnhost regression-issue-74839 ginkgo e2e.test coredns pause agnhost-root.tar; do
        [ -e "$1/$file" ] || return 1
    done
}

# Runs one build, with a line every 15 seconds. Arguments: label, log, command ...
watched() {
    local label=$1 log=$2 start=$SECONDS pid
    shift 2
    say "building $label"
    # In a separate process group, to stop the compiler if the script is interrupted.
    setsid "$@" >"$log" 2>&1 &
    pid=$!
    # Expand now: the variable is out of scope when the trap runs.
    # shellcheck disable=SC2064
    trap "kill -- -$pid 2>/dev/null || true" EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if (((SECONDS - start) % 15 == 0)); then
            say "  $label: $(wc -l <"$log") lines of progress, $((SECONDS - start)) s"
        fi
    done
    wait "$pid" || {
        tail -20 "$log" >&2
        fail "$label could not be built; see the errors above. Check the network and the free space in $CACHE, then retry."
    }
    trap - EXIT
}

build_go_programs() {
    local out=$1 version=k8s.io/component-base/version flags
    flags="-s -w -X $version.gitVersion=$KUBERNETES_VERSION -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES_VERSION")"
    export CGO_ENABLED=0 GOTOOLCHAIN=local GOFLAGS=-mod=readonly
    say "downloading the Go modules of the cluster's programs"
    fetch_modules "$ROOT/e2e/tools/kubernetes" -test k8s.io/kubernetes/cmd/kubelet k8s.io/kubernetes/cmd/kube-scheduler \
        k8s.io/kubernetes/test/images/agnhost k8s.io/kubernetes/test/images/regression-issue-74839 \
        github.com/onsi/ginkgo/v2/ginkgo k8s.io/kubernetes/test/e2e
    fetch_modules "$ROOT/e2e/tools/coredns" github.com/coredns/coredns
    cd "$ROOT/e2e/tools/kubernetes"
    watched "kubelet, kube-scheduler, agnhost and ginkgo (about two minutes on two cores, once)" "$out/build.log" \
        go build -v -trimpath -ldflags "$flags" -o "$out/" k8s.io/kubernetes/cmd/kubelet \
        k8s.io/kubernetes/cmd/kube-scheduler k8s.io/kubernetes/test/images/agnhost \
        k8s.io/kubernetes/test/images/regression-issue-74839 github.com/onsi/ginkgo/v2/ginkgo
    watched "upstream's e2e suite (about two minutes)" "$out/build.log" \
        go test -c -vet=off -v -trimpath -ldflags "$flags" -o "$out/e2e.test" k8s.io/kubernetes/test/e2e
    cd "$ROOT/e2e/tools/coredns"
    watched "CoreDNS (about a minute)" "$out/build.log" \
        go build -v -trimpath -ldflags "-s -w" -o "$out/" github.com/coredns/coredns
    cd "$ROOT"
}

# The files of upstream's test image: a small Debian with the commands that the suite calls, and agnhost.
build_test_root() {
    local out=$1 root=$1/root
    # In a separate mount namespace, so that mounts disappear even if it is killed.
    watched "the test image's files (debootstrap, about a minute)" "$out/build.log" \
        unshare --mount debootstrap --variant=minbase --include=curl,wget,netcat-openbsd,bind9-dnsutils,iproute2,conntrack,ca-certificates \
        bookworm "$root"
    cp "$out/agnhost" "$root/agnhost"
    ln -sf agnhost "$root/agnhost-2"
    # Upstream's image has a DNS server too, which a test of resolv.conf starts.
    cp "$out/coredns" "$root/coredns"
    # Files of upstream's porter server.
    cp "$(cd "$ROOT/e2e/tools/kubernetes" && GOFLAGS=-mod=readonly go list -m -f '{{.Dir}}' k8s.io/kubernetes)"/test/images/agnhost/porter/localhost.{crt,key} "$root/"
    chmod 644 "$root"/localhost.*
    mkdir -p "$root/uploads"
    rm -rf "${root:?}"/var/cache/apt/* "${root:?}"/var/lib/apt/lists/* "${root:?}"/var/log/* "${root:?}"/dev/* \
        "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/*
    tar --create --directory "$root" --sort=name --mtime=@0 --numeric-owner --file "$out/agnhost-root.tar" .
    rm -rf "$root"
}

build_tools() {
    local dir work
    dir=$(cluster_tools_dir)
    complete "$dir" && return 0
    require_go
    mkdir -p "$CACHE/cluster"
    # Of two concurrent runs the second one waits and uses the result.
    exec 9>"$CACHE/cluster/.lock"
    flock -n 9 || { say "waiting for another run to build the cluster's programs"; flock 9; }
    complete "$dir" && return 0
    # Leftovers of interrupted builds; safe because this run holds the lock.
    rm -rf --one-file-system "$CACHE/cluster"/.build.*
    work=$(mktemp -d "$CACHE/cluster/.build.XXXXXX")
    build_go_programs "$work"
    cc -static -Os -o "$work/pause" "$ROOT/e2e/tools/pause/pause.c" ||
        fail "the sandbox's pause program could not be built: install gcc and libc6-dev and retry."
    build_test_root "$work"
    complete "$work" || fail "the build is incomplete: run 'go clean -cache' and retry."
    rm -f "$work/build.log"
    chmod 755 "$work"
    rm -rf "$dir"
    mv "$work" "$dir"
    flock -u 9
}

"$ROOT/hack/setup.sh" "$TARGET"
install_packages containerd=containerd runc=runc debootstrap=debootstrap sysctl=procps iptables=iptables
[ -x /usr/lib/cni/bridge ] || install_packages no-such-command=containernetworking-plugins
build_tools
