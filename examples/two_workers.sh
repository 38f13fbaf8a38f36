#!/bin/sh
# Two workers on this machine build a ladder, each its share, and the parts are merged: docs/scale.md with hosts of one machine.
#
#   sh examples/two_workers.sh [FOLDER [LADDER]]
#
# FOLDER: made here, default two-workers-out. LADDER: a folder with variants.yaml and what it names, default examples/tiny.
# PUBLISH: the command, default `publish`.
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
out=${1:-two-workers-out}
ladder=$(cd "${2:-$here/tiny}" && pwd -P)
publish=${PUBLISH:-publish}
mkdir "$out"
out=$(cd "$out" && pwd -P)

project() { # project NAME: a host's own folder, with the same variants.yaml, the same base and an output of its own
    mkdir "$out/$1"
    for path in "$ladder"/*; do
        case ${path##*/} in build) ;; *) ln -s "$path" "$out/$1/" ;; esac
    done
}

project main
cd "$out/main"
# What all hosts need is made once: statistics, if a solver or the allocator asks for them. A folder of another base, text or
# setting would not be used, since its name is the hash of all three.
if [ -n "${CALIBRATE:-}" ]; then "$publish" calibrate; fi

workers=
trap 'kill $workers 2>/dev/null' INT TERM
for i in 1 2; do
    project "worker-$i"
    mkdir "$out/worker-$i/build"
    for known in statistics base.json; do
        if [ -e "build/$known" ]; then cp -Rp "build/$known" "$out/worker-$i/build/"; fi
    done
    (cd "$out/worker-$i" && exec "$publish" build --all --shard "$i/2" --skip bench --skip card) >"$out/worker-$i.log" 2>&1 &
    workers="$workers $!"
done
failed=0
for worker in $workers; do wait "$worker" || failed=$?; done
cat "$out/worker-1.log" "$out/worker-2.log"
[ "$failed" = 0 ] || exit "$failed"

"$publish" merge ../worker-1/build ../worker-2/build
"$publish" build --all # what is left: the benchmark, of all in one run on one machine so that its rows compare, and the cards
"$publish" verify
