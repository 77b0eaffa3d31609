#!/bin/bash
# g++ without optimization, as the compiler of build_transformer_engine.sh.
#
# Nothing is ever computed with what it compiles, so that it may skip what takes three times as long:
# the last -O is the one that counts. Half of what is left is reading torch's headers, for thirty
# sources the same ones. The first call compiles them (COMPILED_HEADERS, without .gch), with the flags
# of its source, which are those of all.

set -euo pipefail

compile_headers() {
    local flags=()
    while (($#)); do
        case $1 in
        -o | -MF) shift ;;
        -MMD | -MD | -c | *.cpp) ;; # ninja's commands have -c twice
        *) flags+=("$1") ;;
        esac
        shift
    done
    g++ "${flags[@]}" -O0 -x c++-header "$COMPILED_HEADERS" -o "$COMPILED_HEADERS.gch"
}

if [[ " $* " == *'.cpp '* ]]; then
    (
        flock 9 # sources are compiled side by side
        [[ -f $COMPILED_HEADERS.gch ]] || compile_headers "$@"
    ) 9>"$COMPILED_HEADERS.lock"
    set -- -include "$COMPILED_HEADERS" "$@"
fi
exec g++ "$@" -O0
