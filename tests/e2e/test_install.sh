#!/bin/sh
# `cmake --install` gives a tree that works on its own: the program answers from there, on two ranks, with the installed
# configuration and away from the build. usage: test_install.sh BUILD_DIR SOURCE_DIR
set -eu
build=$1 source_dir=$2
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
cmake --install "$build" --prefix "$prefix" >/dev/null
installed=$prefix/bin/vitrail configs=$prefix/share/vitrail/configs
"$installed" --version
"$installed" generate --config "$configs/demo.yaml" --print-config >"$prefix/one"
grep -q '^model: models/demo-vlm$' "$prefix/one"
ls "$prefix"/share/doc/vitrail/configuration.md "$prefix"/share/doc/vitrail/errors.md "$prefix"/share/doc/vitrail/LICENSE
# A working directory with a model, and nothing else of the source tree.
mkdir -p "$prefix/work"
ln -s "$source_dir/models" "$prefix/work/models"
cd "$prefix/work"
question='USER: What is the value of NURSE?
<image> ASSISTANT:'
${MPIEXEC:-mpirun} -np 2 "$installed" generate --config "$configs/demo.yaml" --raw-prompt --prompt "$question" \
    --image models/demo-vlm/dev-eval/images/dev-1p-0000.png >answer
cat answer
grep -q -x ' Jonas Fisher' answer
