#!/usr/bin/env bash
# `make kernels`: the agent's tests of rules and packets on Debian's kernels 6.1 and 6.12, each in an
# emulated machine. Software emulation works without KVM (use ACCELERATION=kvm if available) but takes half an hour,
# so it is not part of `make test`, which tests the running kernel.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_root kernels
require_cargo
cd "$ROOT"

SERIES=${SERIES:-6.1 6.12}
# Longer timeouts, because an emulated machine is slow.
# agent.rs starts the agent's program; scale.rs measures times, which are meaningless in an emulator.
read -ra TESTS <<<"${TESTS:-churn packets kernel}"
MODULES=(veth bridge br_netfilter nf_tables nf_conntrack nf_nat nft_ct nft_nat nft_masq nft_reject_ipv4 nft_reject_ipv6
    nft_numgen nft_chain_nat nft_fib_ipv4 nft_fib_ipv6 nf_conntrack_netlink af_packet)

install_packages cc=gcc qemu-system-x86_64=qemu-system-x86 cpio=cpio depmod=kmod nft=nftables ip=iproute2
# The machine has no libraries, so busybox must be static.
if [ ! -e /bin/busybox ] || ldd /bin/busybox >/dev/null 2>&1; then
    install_packages no-such-command=busybox-static
fi
[ -e /etc/protocols ] || install_packages no-such-command=netbase

say "building the tests"
binaries=$(cargo test --locked -p switchtower-node-agent --no-run --message-format json "${TESTS[@]/#/--test=}" |
    sed -n 's/.*"name":"\([a-z]*\)".*"executable":"\([^"]*\)".*/\1 \2/p')

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Copies a program with its libraries to the same paths.
add_program() {
    local file
    for file in "$1" $(ldd "$1" | sed -n 's|.*=> \(/[^ ]*\).*|\1|p; s|^[[:space:]]*\(/[^ ]*\) (.*|\1|p'); do
        mkdir -p "$work/root$(dirname "$file")"
        cp -L "$file" "$work/root$file"
    done
}

say "assembling the initial file system"
mkdir -p "$work"/root/{bin,dev,proc,sys,run,tmp,tests,var,etc}
cp /bin/busybox "$work/root/bin/"
for program in ip nft; do
    add_program "$(command -v $program)"
    [ -e "$work/root/bin/$program" ] || ln -s "$(command -v $program)" "$work/root/bin/$program"
done
while read -r name executable; do
    add_program "$executable"
    mv "$work/root$executable" "$work/root/tests/$name"
    strip "$work/root/tests/$name"
done <<<"$binaries"
# Test data at the paths of the build.
mkdir -p "$work/root$ROOT/node-agent/tests"
cp -r node-agent/tests/golden "$work/root$ROOT/node-agent/tests/"
# nft prints protocol names.
cp /etc/protocols /etc/services "$work/root/etc/"
cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/bin:/sbin:/usr/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
ip link set lo up
echo /bin/modprobe >/proc/sys/kernel/modprobe
for module in $(cat /modules); do modprobe "$module" || echo "no module $module"; done
echo "KERNEL $(uname -r)"
for test in /tests/*; do
    echo "TEST ${test##*/}"
    SWITCHTOWER_PATIENCE=5000 "$test" --test-threads=1
done
poweroff -f
INIT
chmod +x "$work/root/init"
printf '%s\n' "${MODULES[@]}" >"$work/root/modules"

failed=0
for series in $SERIES; do
    package=$(apt-cache search --names-only "^linux-image-$series\.[0-9.]*[-+].*cloud-amd64\$" | awk '{print $1}' | sort -V | tail -1)
    [ -n "$package" ] || fail "no linux-image package for $series: run 'apt-get update' and retry."
    folder="$CACHE/kernels/$package"
    if [ ! -d "$folder" ]; then
        say "downloading $package"
        mkdir -p "$CACHE/kernels" "$work/download"
        (cd "$work/download" && apt-get download -q -o Acquire::Retries=3 "$package" >"$work/download.log" 2>&1) ||
            fail "$package could not be downloaded ($(tail -n 1 "$work/download.log")): check the network and retry."
        # In the same file system, so that the rename is atomic.
        unpacked=$(mktemp -d "$CACHE/kernels/.unpack.XXXXXX")
        dpkg-deb -x "$work/download/${package}"_*.deb "$unpacked"
        depmod -b "$unpacked" "$(ls "$unpacked/lib/modules")"
        mv "$unpacked" "$folder"
    fi
    say "starting $package: kernel, packets and churn under emulation, some minutes"
    rm -rf "$work/root/lib/modules"
    mkdir -p "$work/root/lib/modules"
    release=$(ls "$folder/lib/modules")
    mkdir -p "$work/root/lib/modules/$release/kernel"
    cp -r "$folder/lib/modules/$release/"modules.* "$work/root/lib/modules/$release/"
    cp -r "$folder/lib/modules/$release/kernel/"{net,lib,crypto} "$work/root/lib/modules/$release/kernel/"
    mkdir -p "$work/root/lib/modules/$release/kernel/drivers"
    cp -r "$folder/lib/modules/$release/kernel/drivers/net" "$work/root/lib/modules/$release/kernel/drivers/"
    (cd "$work/root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initrd"
    log="$CACHE/kernels/$series.log"
    timeout 1800 qemu-system-x86_64 -accel "${ACCELERATION:-tcg}" -cpu max -smp 2 -m 3072 -nic none -nographic -no-reboot \
        -kernel "$folder"/boot/vmlinuz-* -initrd "$work/initrd" -append "console=ttyS0 loglevel=1 panic=-1" \
        </dev/null | stdbuf -oL tr -d '\r' | tee "$log" | grep -E --line-buffered '^(KERNEL|TEST|test |no module)|panicked' >&2 || true
    results=$(grep -c '^test result: ok' "$log" || true)
    if [ "$results" -ne "${#TESTS[@]}" ]; then
        failed=1
        say "$package: $results of ${#TESTS[@]} test programs passed"
        tail -40 "$log" >&2
    fi
    awk -v package="$package" '/^test result: / { passed += $4; failed += $6 }
        END { printf "%s: %d passed, %d failed\n", package, passed, failed }' "$log"
done
exit "$failed"
