#!/bin/sh
# The comparison of the engine with torch, transformers and mlx-vlm, in an environment of its own. Arguments go to pytest.
#
#   sh scripts/parity.sh
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"
PUBLISH_VENV=.venv-parity
export PUBLISH_VENV
sh scripts/setup.sh parity test
exec .venv-parity/bin/python -m pytest -m parity tests/parity "$@"
