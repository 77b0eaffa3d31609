#!/bin/sh
# Prints the path of a Chromium for tests/browser. Where none is on PATH, and apt-get can be used, the
# distribution's package is installed first; what that prints goes to stderr.
#
# usage: find_chromium.sh

set -eu

find_it() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" && return
    done
    return 1
}

find_it && exit

as_root=''
if [ "$(id -u)" != 0 ]; then
    as_root='sudo -n'
fi
echo 'No Chromium on PATH: installing the package chromium with apt-get.' >&2
if ! { $as_root apt-get update -q && $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends chromium; } >&2; then
    echo 'It could not be installed. Install chromium or google-chrome, so that it is on PATH.' >&2
    exit 1
fi
find_it
