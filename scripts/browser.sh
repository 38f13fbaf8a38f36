#!/bin/sh
# The hub's pages in headless Chromium: PUBLISH_CHROMIUM, or the one on the path. Arguments go to pytest.
#
#   sh scripts/browser.sh
#   PUBLISH_PICTURES=docs/images sh scripts/browser.sh    makes the picture of the docs again, from a longer measurement
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"
sh scripts/setup.sh test browser
exec "${PUBLISH_VENV:-.venv}/bin/python" -m pytest -m browser tests/browser "$@"
