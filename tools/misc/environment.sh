# Sourced by the set-up scripts, which set $usage: reads their arguments, defines what they share, and
# makes the virtual environment where there is none. Sets env_dir, its python, and the torch to install.
case ${1:-} in
    -h | --help)
        echo "$usage"
        exit
        ;;
esac
if [ $# -lt 2 ]; then
    echo "$usage" >&2
    exit 2
fi
env_dir=$1
torch=("${@:2}")
python=$env_dir/bin/python

say() { printf '\n== %s\n' "$*"; }
has() { "$python" -c "import $1" > /dev/null 2>&1; }
has_package() { "$python" -m pip show --quiet "$1" 2> /dev/null; }
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Sets constraints: nothing installed with them replaces the torch that is there.
keep_torch() {
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    "$python" -m pip freeze | grep -E '^(torch|torchvision)==' | sed 's/+.*//' > "$constraints"
}

print_versions() {
    say "Ready: $("$python" -W ignore -c '
import mmscalablevit, mmengine, mmcv, mmdet, mmseg, mmpretrain, torch
print(*(f"{m.__name__} {m.__version__}" for m in (mmscalablevit, torch, mmengine, mmcv, mmdet, mmseg, mmpretrain)), sep=", ")')"
}

cd "$(dirname "$0")/../.."
if [ ! -x "$python" ]; then
    say "Creating the virtual environment $env_dir"
    python3 -m venv "$env_dir" ||
        fail 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv'
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $env_dir has $("$python" --version)"
