#!/bin/sh
# Make the image that the tests of containers run: a debootstrap tree with Python, and Jupyter from pip, as one tar.
#
# usage: image.sh TAR PYTHON; it needs root, debootstrap and the network. PYTHON is one that has pip.
set -eu

tar=$1
python=$2
# shellcheck disable=SC1091
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
# shellcheck disable=SC2016 # for apt-get
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT

debootstrap --variant=minbase --include=python3 "$suite" "$tree/image" "$mirror" >"$tree/log" 2>&1 || {
    tail -3 "$tree/log" >&2
    exit 1
}
packages=$(echo "$tree"/image/usr/lib/python3.*)
version=${packages##*/python}
packages=$tree/image/usr/local/lib/python$version/dist-packages
"$python" -m pip install --quiet --disable-pip-version-check --target "$packages" --python-version "$version" \
    --only-binary=:all: notebook nbclient 'jsonschema<4.25' # see LIGHT in tests/jupyters.py
mkdir -p "$tree/image/usr/local/bin" "$tree/image/usr/local/share"
mv "$packages/share/jupyter" "$tree/image/usr/local/share/"
for script in "$packages"/bin/jupyter*; do # pip names its own Python in them
    sed '1s|^#!.*|#!/usr/bin/python3|' "$script" >"$tree/image/usr/local/bin/${script##*/}"
    chmod 755 "$tree/image/usr/local/bin/${script##*/}"
done
rm -rf "${packages:?}/bin" "$packages/share" "$tree/image/var/cache/apt" "$tree/image/var/lib/apt/lists"
mkdir -p "$(dirname "$tar")"
tar -C "$tree/image" -cf "$tar.new" .
chmod 644 "$tar.new"
mv "$tar.new" "$tar"
