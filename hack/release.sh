#!/usr/bin/env bash
# Builds all files of a release: images as OCI archives, install.yaml, charts, the kubectl plugin with its krew manifest,
# SBOMs (CycloneDX) and checksums. It publishes nothing; docs/releasing.md lists the commands that do.
#
#   hack/release.sh [--dry-run] [--registry REGISTRY] [--downloads URL] [FOLDER]
#
# The version is the one of the workspace in Cargo.toml. A release requires a clean checkout of the tag vVERSION and a
# section for the version in CHANGELOG.md. --dry-run skips these checks and builds the debug profile for this machine's
# architecture only. FOLDER (default: dist) must be empty or a previous result.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DRY_RUN=
REGISTRY=switchtower.dev
DOWNLOADS=https://switchtower.dev/releases
FOLDER=$ROOT/dist
while [ $# -gt 0 ]; do
    case "$1" in
    --dry-run) DRY_RUN=yes ;;
    --registry) REGISTRY=${2:?--registry needs a value} && shift ;;
    --downloads) DOWNLOADS=${2:?--downloads needs a value} && shift ;;
    -*) fail "unknown option $1; see the first lines of hack/release.sh" ;;
    *) FOLDER=$1 ;;
    esac
    shift
done

VERSION=$(project_version)
TAG=v$VERSION
[ -n "$VERSION" ] || fail "Cargo.toml contains no workspace version."
if [ -z "$DRY_RUN" ]; then
    [ -z "$(git -C "$ROOT" status --porcelain)" ] || fail "the checkout has changes: commit or stash them and retry."
    [ "$(git -C "$ROOT" describe --tags --exact-match 2>/dev/null)" = "$TAG" ] ||
        fail "HEAD is not tagged $TAG: set the version in Cargo.toml, commit, and run 'git tag --sign $TAG'."
    grep -q "^## \[\?$VERSION" "$ROOT/CHANGELOG.md" ||
        fail "CHANGELOG.md has no section for $VERSION: rename the section Unreleased."
fi
if [ -e "$FOLDER" ] && [ -n "$(ls -A "$FOLDER")" ]; then
    [ -e "$FOLDER/SHA256SUMS" ] || fail "$FOLDER is neither empty nor the result of a previous run: choose another folder."
    rm -rf "$FOLDER"
fi
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A tar.gz with the same bytes in every build. Arguments: archive, folder, files ...
reproducible_tar() {
    local archive=$1 folder=$2
    shift 2
    tar --create --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX,go-w \
        --directory "$folder" "$@" | gzip --no-name >"$archive"
}

build_images() {
    local arches options=(--tag "$TAG")
    if [ -n "$DRY_RUN" ]; then
        arches=$(host_arch)
    else
        arches=amd64,arm64
        options+=(--release)
    fi
    "$ROOT/hack/images.sh" "${options[@]}" --arch "$arches" "$work"
    mkdir "$FOLDER/images"
    mv "$work"/images/*.tar "$FOLDER/images/"
}

# All manifests in one file, with the images of this release.
build_install_yaml() {
    local kubectl
    kubectl=$(control_plane_dir)/kubectl
    [ -x "$kubectl" ] || "$ROOT/hack/setup.sh" setup
    # kustomize accepts only relative paths.
    local overlay=$work/overlay base
    mkdir "$overlay"
    base=$(realpath --relative-to="$overlay" "$ROOT/manifests")
    {
        printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [%s]\nimages:\n' "$base"
        for image in switchtower-controller switchtower-node-agent; do
            printf -- '- {name: switchtower.dev/%s, newName: %s/%s, newTag: %s}\n' "$image" "$REGISTRY" "$image" "$TAG"
        done
    } >"$overlay/kustomization.yaml"
    "$kubectl" kustomize "$overlay" >"$FOLDER/install.yaml"
}

build_charts() {
    local chart helm
    build_helm
    helm=$(tool_dir helm)/helm
    mkdir "$work/charts"
    for chart in switchtower-crds switchtower; do
        # Dereferences the links to files of manifests/ and crds/.
        cp -rL "$ROOT/charts/$chart" "$work/charts/"
        [ "$chart" != switchtower ] || sed -i "s|^imageRegistry: .*|imageRegistry: $REGISTRY|" "$work/charts/$chart/values.yaml"
        find "$work/charts/$chart" -exec touch --date="@$SOURCE_DATE_EPOCH" {} +
        "$helm" package --version "$VERSION" --app-version "$TAG" --destination "$FOLDER" "$work/charts/$chart" >&2
    done
}

build_plugin() {
    local arch archive list=$work/platforms.yaml
    : >"$list"
    for folder in "$work"/programs/*/; do
        arch=$(basename "$folder")
        archive=kubectl-switchtower-linux-$arch.tar.gz
        cp "$ROOT/LICENSE" "$ROOT/cli/kubectl_complete-switchtower" "$folder"
        reproducible_tar "$FOLDER/$archive" "$folder" kubectl-switchtower kubectl_complete-switchtower LICENSE
        cat >>"$list" <<YAML
  - selector:
      matchLabels: {os: linux, arch: $arch}
    uri: $DOWNLOADS/$TAG/$archive
    sha256: $(sha256sum "$FOLDER/$archive" | cut -d' ' -f1)
    bin: kubectl-switchtower
YAML
    done
    cat >"$FOLDER/krew-switchtower.yaml" <<YAML
apiVersion: krew.googlecontainertools.github.com/v1alpha2
kind: Plugin
metadata:
  name: switchtower
spec:
  version: $TAG
  homepage: https://switchtower.dev
  shortDescription: State, rollouts and explanations of Switchtower
  description: |
    Shows the state of the service proxy on every node, explains the path of a Service, controls rollouts, and compares
    the tables of a node with those that the controller compiled.
  platforms:
$(cat "$list")
YAML
}

# One SBOM per program. The generator writes next to Cargo.toml, so it runs on a copy of the sources.
build_sboms() {
    local tools package
    tools=$(cyclonedx_dir)
    build_cyclonedx
    mkdir "$work/source"
    tar --create --exclude=./target --exclude=./.git --exclude=./dist --directory "$ROOT" . | tar --extract --directory "$work/source"
    (cd "$work/source" && PATH="$tools/bin:$PATH" cargo cyclonedx --quiet --format json --spec-version 1.5 \
        --target "$(rust_target amd64)" --no-build-deps) || fail "cargo-cyclonedx failed; see the errors above."
    local folder program
    while read -r folder package program; do
        sed "s|path+file://$work/source|path+file:///src|g" "$work/source/$folder/$package.cdx.json" \
            >"$FOLDER/$program.cdx.json"
    done <<PROGRAMS
standalone switchtower-standalone switchtower-controller
node-agent switchtower-node-agent switchtower-node-agent
cli kubectl-switchtower kubectl-switchtower
PROGRAMS
}

say "Switchtower $TAG${DRY_RUN:+ (dry run: debug profile, $(host_arch) only)}"
build_images
build_install_yaml
build_charts
build_plugin
build_sboms
(cd "$FOLDER" && find . -type f ! -name SHA256SUMS -printf '%P\n' | sort | xargs sha256sum >"$work/sums" && mv "$work/sums" SHA256SUMS)
say "$(wc -l <"$FOLDER/SHA256SUMS") files in $FOLDER; docs/releasing.md describes how to sign and publish them"
