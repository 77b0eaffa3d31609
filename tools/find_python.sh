#!/bin/sh
# Prints the path of a Python that can hold the project's virtual environment: at least 3.12, with
# venv, ensurepip and ssl. Every candidate is run, because a name on PATH may be a pyenv shim that
# fails. If none will do, says on stderr what was tried and what was wrong with each.
#
# usage: find_python.sh [DIRECTORY...]
#   DIRECTORY...  where to look besides $PYTHON, PATH, pyenv and conda
#                 (default: /usr/bin /usr/local/bin ~/.local/bin)
#
# Only built-in commands of the shell are used: PATH may hold nothing else.

set -u

[ $# -gt 0 ] || set -- /usr/bin /usr/local/bin "${HOME:-}/.local/bin"

CHECK='
import sys
found = ".".join(map(str, sys.version_info[:3]))
if sys.version_info < (3, 12):
    sys.exit(f"is Python {found}, older than 3.12")
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit(f"is Python {found} without the module {error.name}")
print(sys.executable)
'

tried=''

# try PATH: print the interpreter and end if it will do, remember why not otherwise.
try() {
    [ -f "$1" ] && [ -x "$1" ] || return 0
    case "$tried" in *"  $1: "*) return 0 ;; esac
    if answer=$("$1" -c "$CHECK" 2>&1 </dev/null); then
        printf '%s\n' "$answer"
        exit 0
    fi
    tried="$tried  $1: $(first_line "$answer")
"
}

first_line() {
    newline='
'
    text=${1:-fails to run}
    printf '%s' "${text%%"$newline"*}"
}

# try_name NAME DIRECTORY...: look for one name on PATH, in pyenv, in the directories and in conda.
try_name() {
    name=$1
    shift
    old_ifs=$IFS
    IFS=:
    set -f
    for folder in ${PATH:-}; do
        try "$folder/$name"
    done
    set +f
    IFS=$old_ifs
    for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin "$@" \
        ${CONDA_PREFIX:+"$CONDA_PREFIX/bin"} \
        "${HOME:-}"/miniconda3/bin "${HOME:-}"/miniconda3/envs/*/bin \
        "${HOME:-}"/anaconda3/bin "${HOME:-}"/anaconda3/envs/*/bin \
        "${HOME:-}"/miniforge3/bin "${HOME:-}"/miniforge3/envs/*/bin; do
        try "$folder/$name"
    done
}

if [ -n "${PYTHON:-}" ]; then
    try "$(command -v "$PYTHON" || printf '%s' "$PYTHON")"
    [ -z "$tried" ] || printf 'PYTHON is set to an interpreter that will not do:\n%s' "$tried" >&2
fi

# 3.12 is the version this project is tested with.
for name in python3.12 python3.13 python3.14 python3 python; do
    try_name "$name" "$@"
done

{
    printf 'No Python >= 3.12 with venv, ensurepip and ssl was found. Tried:\n'
    printf '%s' "${tried:-  nothing: there is no interpreter on PATH, in pyenv, in conda or in $*
}"
    printf 'Install one of: the packages python3.12 and python3.12-venv of your distribution;\n'
    printf '"pyenv install 3.12"; "conda create -n py312 python=3.12".\n'
    printf 'Or name one: make PYTHON=path/to/python3.12\n'
} >&2
exit 1
