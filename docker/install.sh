#!/bin/bash
# Installs megatron-core and this project into a Python that already has its torch, as NVIDIA's
# container does. Nothing that is installed is changed: not torch, not Transformer Engine, not apex.
#
# usage: install.sh [SOURCE]
#   SOURCE  the folder of the project (default: the one above this script); it is installed
#           in place, so that it has to stay
#   PYTHON  (environment) the interpreter to install into (default: python3)
#
# Transformer Engine and apex are never installed here: the container brings them, and the apex of
# the package index is another project.

set -euo pipefail

source=$(cd "${1:-"$(dirname "$0")/.."}" && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

install() {
    "$python" -m pip install --disable-pip-version-check --no-cache-dir "$@"
}

# What is installed, as constraints for pip: it can add to it, but not replace any of it.
installed() {
    "$python" -m pip list --disable-pip-version-check --format=freeze --exclude megatron-core \
        --exclude megatron-dion
}

version_of() {
    "$python" -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' \
        "$1" 2>/dev/null || true
}

# lacking EXTRA...: the requirements of some extras of which no version is installed.
lacking() {
    "$python" - "$source/pyproject.toml" "$@" <<'EOF'
import importlib.metadata
import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
for extra in sys.argv[2:]:
    for requirement in extras[extra]:
        try:
            importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0])
        except importlib.metadata.PackageNotFoundError:
            print(requirement)
EOF
}

torch=$(version_of torch)
if [ -z "$torch" ]; then
    echo "$python has no torch: install the one for this machine first" >&2
    exit 1
fi
installed >"$scratch/installed"

# Without dependencies: theirs are torch and what the next step adds.
install --no-deps "$(grep '^megatron-core==' "$source/constraints.txt")"

mapfile -t missing < <(lacking data run)
if [ "${#missing[@]}" -gt 0 ]; then
    echo "adding ${missing[*]}"
    install --constraint "$scratch/installed" "${missing[@]}"
fi

# Constraints of the container's own would bind the isolated build too, which wants its setuptools.
PIP_CONSTRAINT='' install --no-deps --editable "$source"

if [ "$(version_of torch)" != "$torch" ]; then
    echo "torch was $torch and is now $(version_of torch)" >&2
    exit 1
fi
installed >"$scratch/now"
if changed=$(grep -vxFf "$scratch/now" "$scratch/installed"); then
    printf 'these were there, and were replaced:\n%s\n' "$changed" >&2
    exit 1
fi

"$python" -W ignore -c 'import torch, megatron.core, megatron_dion'
# What the doctor finds. What fails on the machine that builds may be right on another.
"$python" -W ignore -m megatron_dion_tools doctor --no-collectives || true
