# Sourced by the set-up scripts, which set $usage: reads their arguments, defines what they share, and
# makes the virtual environment where there is none. Sets env_dir, its python, and the torch to install.
case ${1:-} in
    -h | --help)
        echo "$usage"
        exit
        ;;
esac
if [ $# -lt 1 ]; then
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

# Installs the torchvision of the torch that is there, from the index of its build if that can be reached.
fit_torchvision() {
    local requirement
    read -ra requirement <<< "$(PYTHONPATH=mmscalablevit "$python" -c 'import compat; print(compat.torchvision_requirement())')"
    say "Installing ${requirement[0]} for the torch that is there"
    pip_install --timeout 10 --retries 0 --force-reinstall --no-deps "${requirement[@]}" ||
        pip_install --force-reinstall --no-deps "${requirement[0]}"
    pip_install numpy pillow
}

# look [MODULE...]: what is installed is imported; the first fault ends the set-up in one sentence.
look() {
    local module found
    found=$("$python" -W ignore -c 'from mmscalablevit.compat import torchvision_fault; print(torchvision_fault() or "")') ||
        fail "mmscalablevit does not import: $found"
    [ -z "$found" ] || fail "$found"
    for module in "$@"; do
        has "$module" || fail "$module does not import: $("$python" -W ignore -c "import $module" 2>&1 | tail -1)"
    done
    say "Ready: $("$python" -W ignore -c '
import mmscalablevit, mmengine, mmcv, mmdet, mmseg, mmpretrain, torch, torchvision
modules = mmscalablevit, torch, torchvision, mmengine, mmcv, mmdet, mmseg, mmpretrain
print(*(f"{m.__name__} {m.__version__}" for m in modules), sep=", ")')"
}

cd "$(dirname "$0")/../.."
if [ ! -x "$python" ]; then
    say "Creating the virtual environment $env_dir"
    python3 -m venv "$env_dir" ||
        fail 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv'
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $env_dir has $("$python" --version)"
