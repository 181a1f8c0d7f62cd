#!/usr/bin/env bash
# Builds static programs and, from them and manifests/Containerfile, the images as OCI archives. Needs no container
# engine and no registry. Equal sources, toolchain, profile and SOURCE_DATE_EPOCH give equal image digests.
#
#   hack/images.sh [--release] [--arch amd64,arm64] [--tag TAG] [--programs-only] [--relink] FOLDER
#
# Writes FOLDER/programs/ARCH/PROGRAM and FOLDER/images/IMAGE-ARCH.tar. The default is the debug profile, the
# architecture of this machine and the tag `dev`. SOURCE_DATE_EPOCH defaults to the time of the last commit.
# The debug profile reuses the libraries of the workspace build and, without --relink, unchanged programs.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

IMAGES="switchtower-controller switchtower-node-agent"
PREFIX=switchtower.dev
PROFILE=debug
ARCHES=$(host_arch)
TAG=dev
PROGRAMS_ONLY=
RELINK=
FOLDER=
while [ $# -gt 0 ]; do
    case "$1" in
    --release) PROFILE=release ;;
    --arch) ARCHES=${2:?--arch needs a value} && shift ;;
    --tag) TAG=${2:?--tag needs a value} && shift ;;
    --programs-only) PROGRAMS_ONLY=yes ;;
    --relink) RELINK=yes ;;
    -*) fail "unknown option $1; see the first lines of hack/images.sh" ;;
    *) FOLDER=$1 ;;
    esac
    shift
done
[ -n "$FOLDER" ] || fail "use: hack/images.sh [--release] [--arch amd64,arm64] [--tag TAG] [--programs-only] [--relink] FOLDER"

# Package of a program.
package_of() {
    case "$1" in
    switchtower-controller) echo switchtower-standalone ;;
    *) echo "$1" ;;
    esac
}

# Builds a program statically and copies it without debug information. Only the program itself is compiled with
# crt-static, so its dependencies are shared with other builds. Arguments: package, architecture.
build_program() {
    local program=$1 arch=$2 target out strip=strip
    target=$(rust_target "$arch")
    out=$(target_dir)/$PROFILE/$program
    say "building $program for $arch, $PROFILE profile"
    if [ "$PROFILE" = debug ] && [ "$arch" = "$(host_arch)" ]; then
        out=$(target_dir)/oci/unstripped/$program
        relink "$program" "$out"
    else
        local options=(--locked --package "$(package_of "$program")" --bin "$program" --target "$target")
        [ "$PROFILE" = debug ] || options+=("--$PROFILE")
        out=$(target_dir)/$target/$PROFILE/$program
        [ "$arch" = "$(host_arch)" ] || strip=${target%%-*}-linux-gnu-strip
        (cd "$ROOT" && cargo rustc "${options[@]}" -- -C target-feature=+crt-static) ||
            fail "cargo could not build $program for $arch; see the errors above."
    fi
    mkdir -p "$FOLDER/programs/$arch"
    "$strip" --strip-debug -o "$FOLDER/programs/$arch/$program" "$out"
    chmod 755 "$FOLDER/programs/$arch/$program"
}

# Compiles only the main file of a program, against the libraries of the workspace build. With a single package,
# `cargo rustc` would rebuild most dependencies with other features, which takes minutes. Arguments: program, output.
relink() {
    local program=$1 out=$2 crate library clap main inputs
    crate=$(package_of "$program")
    crate=${crate//-/_}
    library=$(rlib "$crate" <<<"$ARTIFACTS")
    clap=$(rlib clap <<<"$ARTIFACTS")
    main=$(sed -n "s|.*\"name\":\"$program\".*\"src_path\":\"\([^\"]*/main.rs\)\".*|\1|p" <<<"$ARTIFACTS" | head -1)
    [[ -n $library && -n $clap && -n $main ]] || fail "cargo did not report the files of $program."
    inputs=$(rustc --version; stat --format='%n %y' "$library" "$clap" "$main")
    if [ -z "$RELINK" ] && [ -e "$out" ] && [ "$inputs" = "$(cat "$out.inputs" 2>/dev/null)" ]; then
        return 0
    fi
    mkdir -p "$(dirname "$out")"
    rm -f "$out.inputs"
    (cd "$ROOT" && rustc --edition 2024 --crate-name "${program//-/_}" --crate-type bin -C target-feature=+crt-static \
        -L "dependency=$(dirname "$clap")" --extern "clap=$clap" --extern "$crate=$library" -o "$out" \
        "${main#"$ROOT"/}") || fail "$program could not be linked statically; install libc6-dev and see the errors above."
    printf '%s\n' "$inputs" >"$out.inputs"
}

# Path of a library in cargo's messages.
rlib() { sed -n "s|.*\"kind\":\[\"lib\"\],.*\"name\":\"$1\".*\"filenames\":\[\"\([^\"]*\.rlib\)\".*|\1|p" | head -1; }

# Prepares a cross build: linker and standard library.
prepare_arch() {
    local arch=$1 target
    target=$(rust_target "$arch")
    [ "$arch" != "$(host_arch)" ] || return 0
    local gcc=${target%%-*}-linux-gnu-gcc
    install_packages "$gcc=gcc-${target%%-*}-linux-gnu"
    [ -e "/usr/${target%%-*}-linux-gnu/include/stdlib.h" ] || install_packages "no-such-command=libc6-dev-$arch-cross"
    [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || rustup target add "$target" ||
        fail "the standard library for $target is missing: run 'rustup target add $target' and retry."
    local variable=${target//-/_}
    export "CARGO_TARGET_${variable^^}_LINKER=$gcc" "CC_$variable=$gcc"
}

build_image() {
    local image=$1 arch=$2 name=$PREFIX/$1:$TAG archive=$FOLDER/images/$1-$2.tar
    "${BUILDAH[@]}" build --quiet --isolation chroot --format oci --timestamp "$TIMESTAMP" \
        --platform "linux/$arch" --target "${image#switchtower-}" --tag "$name" \
        --label "org.opencontainers.image.title=$image" --label "org.opencontainers.image.version=$(project_version)" \
        --label org.opencontainers.image.licenses=Apache-2.0 \
        --file "$ROOT/manifests/Containerfile" "$FOLDER/programs" >/dev/null ||
        fail "buildah could not build $image for $arch; see the errors above."
    rm -f "$archive"
    "${BUILDAH[@]}" push --quiet "$name" "oci-archive:$archive:$name" ||
        fail "buildah could not write $archive; see the errors above."
}

require_cargo
# Set by cargo for programs that it runs, such as tests. Build scripts depend on them: cargo would rebuild crates.
while IFS='=' read -r variable _; do
    unset "$variable"
done < <(env | grep -E '^CARGO_(PKG_|MANIFEST_|CRATE_|BIN_|PRIMARY_)' || true)
TIMESTAMP=${SOURCE_DATE_EPOCH:-$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null || echo 0)}
# Build scripts of C code depend on it: cargo would rebuild them and most other crates, with equal results.
unset SOURCE_DATE_EPOCH
# Removes paths of this machine from panic messages, so that builds in different folders are equal. Not in the debug
# profile, which shares its dependencies with the tests.
[ "$PROFILE" = debug ] ||
    export RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$ROOT=/src --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
if [ "$PROFILE" = debug ]; then
    ARTIFACTS=$(cd "$ROOT" && cargo build --locked --workspace --bins --message-format=json) ||
        fail "cargo could not build the workspace; see the errors above."
fi
for arch in ${ARCHES//,/ }; do
    prepare_arch "$arch"
    for image in $IMAGES; do
        build_program "$image" "$arch"
    done
    build_program kubectl-switchtower "$arch"
done
[ -z "$PROGRAMS_ONLY" ] || exit 0

install_packages buildah=buildah skopeo=skopeo
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Without the machine's storage and without overlayfs, which a container may not mount.
BUILDAH=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
mkdir -p "$FOLDER/images"
for arch in ${ARCHES//,/ }; do
    for image in $IMAGES; do
        build_image "$image" "$arch"
    done
done
say "images in $FOLDER/images: $(cd "$FOLDER/images" && echo *.tar)"
