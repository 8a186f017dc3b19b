#!/bin/sh
# `cmake --install` gives a tree that works on its own. usage: test_install.sh BUILD_DIR
set -eu
prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
cmake --install "$1" --prefix "$prefix" >/dev/null
"$prefix/bin/vitrail" --version
"$prefix/bin/vitrail" generate --config "$prefix/share/vitrail/configs/demo.yaml" --print-config >"$prefix/one"
grep -q '^model: models/demo-vlm$' "$prefix/one"
ls "$prefix"/share/doc/vitrail/configuration.md "$prefix"/share/doc/vitrail/LICENSE
