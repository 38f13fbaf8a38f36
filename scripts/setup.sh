#!/bin/sh
# Makes .venv in the checkout and installs this project into it, with the MLX backend of this machine.
#
#   sh scripts/setup.sh [GROUP...]    GROUP: a dependency group of pyproject.toml (test, lint, parity)
#
# Run again, it does nothing until pyproject.toml, the backend or the groups asked for change.
#
#   PYTHON          the interpreter to use; default: the first of python3.13, python3.12, python3.11, python3 that fits
#   PUBLISH_EXTRA   cpu, cuda13 or none; default: by platform
#   PUBLISH_VENV    folder of the environment; default: .venv
set -eu

root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"
venv=${PUBLISH_VENV:-.venv}
stamp=$venv/setup.stamp

stop() {
    echo "setup: $*" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------ backend

driver=0
if command -v nvidia-smi >/dev/null 2>&1; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]\{1,\}\).*/\1/p')
fi
platform="$(uname -s) $(uname -m)"
if [ -n "${PUBLISH_EXTRA:-}" ]; then
    extra=$PUBLISH_EXTRA
else
    case $platform in
        "Darwin arm64") extra=none ;;
        "Linux x86_64" | "Linux aarch64")
            # 580 is the first NVIDIA driver for CUDA 13
            if [ "${driver:-0}" -ge 580 ]; then extra=cuda13; else extra=cpu; fi
            ;;
        *) stop "no MLX for $platform: it needs macOS on Apple silicon, or Linux on x86_64 or aarch64" ;;
    esac
fi
case $extra in
    none) target=. ;;
    cpu | cuda13) target=".[$extra]" ;;
    *) stop "PUBLISH_EXTRA is '$extra'; expected cpu, cuda13 or none" ;;
esac

# ------------------------------------------------------------------------------------------------ is there anything to do

# the stamp: what was installed from, where and for which backend, then a group a line
inputs=$(cksum <pyproject.toml)
place="$extra $root"
have=
if [ -f "$stamp" ]; then
    if [ "$(sed -n 2p "$stamp")" = "$place" ]; then
        have=$(sed 1,2d "$stamp")
    else
        rm -rf "$venv" # its scripts name the place where the checkout was, or two backends would overwrite each other
    fi
fi
missing=
for group in "$@"; do
    echo "$have" | grep -qx -e "$group" || missing=$group
done
if [ -z "$missing" ] && [ -x "$venv/bin/publish" ] && [ "$(sed 1q "$stamp" 2>/dev/null)" = "$inputs" ]; then
    exit 0
fi

# ------------------------------------------------------------------------------------------------ environment

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || stop "no Python 3.11 or newer with its venv module (Debian, Ubuntu: apt-get install python3-venv)"
    echo "setup: making $venv with $("$python" -V)" >&2
    "$python" -m venv --clear "$venv"
    have=
fi
py=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$py" -m pip --version >/dev/null 2>&1 || "$py" -m ensurepip --upgrade >/dev/null
# --group is of pip 25.1
if ! "$py" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 1))'; then
    "$py" -m pip install --quiet --upgrade 'pip>=25.1'
fi

groups=$(printf '%s\n' $have "$@" | sed '/^$/d' | sort -u)
echo "setup: installing $target" $groups >&2
rm -f "$stamp"
set --
for group in $groups; do
    set -- "$@" --group "$group"
done
# one call, so that the versions of all parts fit together; setuptools has a long warning for every editable installation
PYTHONWARNINGS=ignore "$py" -m pip install --quiet --editable "$target" "$@"
{
    echo "$inputs"
    echo "$place"
    [ -z "$groups" ] || echo "$groups"
} >"$stamp"
