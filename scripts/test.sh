#!/bin/sh
# The tests, offline and on any backend; what compares with torch is in parity.sh. Arguments go to pytest.
#
#   sh scripts/test.sh                             all, in two processes
#   sh scripts/test.sh tests/test_x.py -k y ...    some
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"
sh scripts/setup.sh test
# hundreds of processes of the tests import the project: it is compiled once, not by each of them
unset PYTHONDONTWRITEBYTECODE
# a worker a core is enough: threads of a BLAS would wait for each other
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
exec "${PUBLISH_VENV:-.venv}/bin/python" -m pytest "$@"
