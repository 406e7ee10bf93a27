#!/usr/bin/env bash
# The C++ compiler while mmcv is built; setup_env.sh puts it first on PATH under the name c++.
# PyTorch's headers, nearly all that a file of mmcv has to parse, are compiled once and kept. Newer
# ones need C++20, mmcv asks for C++17. Debug information doubles the time and nobody reads it.
set -euo pipefail
: "${CXX_REAL:?}" "${CXX_HEADER:?}"

if [[ " $* " != *' -c '* ]]; then
    exec "$CXX_REAL" "$@"
fi
all=() shared=() names_file=
for arg in "$@"; do
    case $arg in -g | -std=*) continue ;; esac
    all+=("$arg")
    if [ -n "$names_file" ]; then
        names_file=
        continue
    fi
    case $arg in
        -MF | -o) names_file=1 ;;
        -c | *.cpp | -MMD) ;;
        *) shared+=("$arg") ;;
    esac
done
(
    flock 9
    if [ ! -e "$CXX_HEADER.gch" ]; then
        echo '#include <torch/types.h>' > "$CXX_HEADER"
        "$CXX_REAL" "${shared[@]}" -std=c++20 -x c++-header "$CXX_HEADER" -o "$CXX_HEADER.gch"
    fi
) 9> "$CXX_HEADER.lock"
exec "$CXX_REAL" -include "$CXX_HEADER" "${all[@]}" -std=c++20
