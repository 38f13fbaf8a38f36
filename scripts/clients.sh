#!/bin/sh
# The built-in hub against released clients of the Hub, each in an environment of its own below .clients. Needs the
# registries (PyPI, npm), for the installation only. Arguments go to pytest.
#
#   sh scripts/clients.sh
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"
sh scripts/setup.sh test
venv=${PUBLISH_VENV:-.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1

python_client() { # python_client NAME REQUIREMENT
    stamp=.clients/$1/requirement
    [ "$(cat "$stamp" 2>/dev/null)" != "$2" ] || return 0
    echo "clients: installing $2" >&2
    "$venv/bin/python" -m venv --clear ".clients/$1"
    ".clients/$1/bin/python" -m pip install --quiet "$2"
    echo "$2" >"$stamp"
}

npm_client() { # npm_client NAME REQUIREMENT
    stamp=.clients/$1/requirement
    [ "$(cat "$stamp" 2>/dev/null)" != "$2" ] || return 0
    echo "clients: installing $2" >&2
    rm -rf ".clients/$1"
    mkdir -p ".clients/$1"
    echo '{"private": true}' >".clients/$1/package.json"
    (cd ".clients/$1" && npm install --silent --no-audit --no-fund --no-package-lock "$2")
    echo "$2" >"$stamp"
}

python_client hf-2 'huggingface_hub>=2.4,<3'
python_client hf-1 'huggingface_hub>=1.33,<2'
python_client hf-0 'huggingface_hub>=0.36,<0.37'
# Node 18 is the first with the `fetch` that the client needs.
if command -v npm >/dev/null 2>&1 && node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null; then
    npm_client npm-2 '@huggingface/hub@^2.17.5'
else
    echo "clients: NOT TESTED: @huggingface/hub: this machine has no Node 18 or newer with npm" >&2
fi

exec "$venv/bin/python" -m pytest -m clients -rs tests/clients "$@"
