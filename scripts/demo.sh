#!/bin/sh
# The whole way on the bundled tiny model: build, smoke-test, benchmark, cards, push to the built-in hub.
#
#   sh scripts/demo.sh [--out FOLDER] [--quick]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
sh "$root/scripts/setup.sh"
case ${PUBLISH_VENV:-.venv} in
    /*) venv=$PUBLISH_VENV ;;
    *) venv=$root/${PUBLISH_VENV:-.venv} ;;
esac
exec "$venv/bin/python" "$root/examples/demo.py" "$@"
