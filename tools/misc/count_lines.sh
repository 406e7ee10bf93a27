#!/usr/bin/env bash
# Lines of Python and shell, in all and of what is too long for one file: exit code 1 if there is any.
set -euo pipefail
cd "$(dirname "$0")/../.."

count() { git ls-files -z -- "$@" | xargs -0 cat | wc -l; }
printf '%-16s %6d lines\n' mmscalablevit "$(count 'mmscalablevit/*.py')" \
    'tools and demo' "$(count 'tools/*.py' 'tools/*.sh' 'demo/*.py' 'demo/*.sh')" tests "$(count 'tests/*.py')"
git ls-files -z -- '*.py' '*.sh' | xargs -0 wc -l |
    awk '$2 != "total" && $1 > 450 { print $2 ": " $1 " lines, 450 are allowed"; bad = 1 } END { exit bad }'
