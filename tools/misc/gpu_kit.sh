#!/usr/bin/env bash
# Tests and measures the backbone on a GPU machine that may reach no network, in three steps.
set -euo pipefail

usage='usage: tools/misc/gpu_kit.sh collect KIT [TORCH_REQUIREMENT...]
       tools/misc/gpu_kit.sh setup KIT
       tools/misc/gpu_kit.sh measure OUT
collect, with a network and the Python of the GPU machine: puts all wheels into KIT.
setup, on the GPU machine: makes KIT/env of them. mmcv is compiled for the GPU that is there, and kept in
    KIT/cache for the next time.
measure, there: tests, benchmark, and operators against their lower bound; all results are in OUT.
The variable PYTHON names another Python than python3, for measure KIT/env/bin/python by its full path.
DEVICE=cpu measures tiny cases on a CPU, to test this script.
example: tools/misc/gpu_kit.sh measure work_dirs/gpu'

collect() {
    "${PYTHON:-python3}" -m pip download --dest "$kit/wheels" --prefer-binary "${@:-torch==2.14.1}" torchvision \
        '.[all,test]' ninja numpy packaging psutil 'setuptools>=77' wheel opencv-python-headless pip
}

setup() {
    [ -d "$kit/wheels" ] || fail "$kit/wheels does not exist: collect them first"
    # Without a list of architectures, PyTorch compiles for the GPUs that are there.
    unset TORCH_CUDA_ARCH_LIST
    PIP_NO_INDEX=1 PIP_FIND_LINKS=$kit/wheels PIP_CACHE_DIR=$kit/cache MMCV_WHEELS=$kit/none MAX_JOBS=$(nproc) \
        tools/misc/setup_env.sh "$kit/env" torch torchvision
}

# benchmark NAME OPTION...
benchmark() {
    say "Benchmark: $1"
    "$python" tools/analysis_tools/benchmark.py --device "$device" --out "$out/$1" "${@:2}" 2>&1 |
        tee "$out/$1.log" || say "Failed, see $out/$1.log; the rest goes on"
}

# The authors' setting: Faster R-CNN at 1500x1000.
detectors() {
    mkdir -p "$out/configs"
    cat > "$out/configs/faster_r50.py" <<< "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'"
    cat > "$out/configs/faster_swin-t.py" << 'CONFIG'
_base_ = 'faster_r50.py'
model = dict(
    backbone=dict(_delete_=True, type='SwinTransformer'), neck=dict(in_channels=[96, 192, 384, 768])
)
CONFIG
    cat > "$out/configs/faster_small.py" << 'CONFIG'
_base_ = 'faster_r50.py'
model = dict(
    backbone=dict(_delete_=True, type='ScalableViT'), neck=dict(in_channels=[64, 128, 256, 512])
)
CONFIG
}

measure() {
    mkdir -p "$out"
    local python=${PYTHON:-python3} device=${DEVICE:-cuda}
    local images=(64x224x224 256x224x224 8x512x512 1x800x1344 2x800x1344) photos=2x800x1344 scenes=2x512x512
    # mmcv's RoIAlign takes no bfloat16.
    local whole=float16
    local dtypes=(bfloat16 float32 float16) peers=(swin-t swin-t:fused twins-svt-s pvtv2-b2 convnext-t resnet-50)
    local published=1x1000x1500 rounds=10
    local ours=(small base large small-merged plain small:cp small:compiled swin-t:compiled)
    if [ "$device" = cpu ]; then
        images=(1x64x64) photos=1x64x64 scenes=2x64x64 published=1x64x64
        dtypes=(bfloat16) whole=float32 peers=(swin-t) ours=(small) rounds=1
    fi
    say Tests
    MMSCALABLEVIT_TEST_DEVICE=$device "$python" -m pytest tests/test_gpu.py -q --durations 0 \
        --junitxml "$out/tests.xml" ${PYTEST_ARGS:-} | tee "$out/tests.log" || true
    benchmark backbones --models "${ours[@]}" "${peers[@]}" --sizes "${images[@]}" --dtypes "${dtypes[@]}" \
        --rounds $rounds
    [ "$device" = cpu ] || benchmark attention --models small small:flash small:efficient small:cudnn \
        --sizes "${images[@]}" --dtypes bfloat16 --rounds $rounds
    detectors
    benchmark detectors --models "$out"/configs/faster_{small,swin-t,r50}.py --sizes $published \
        --dtypes float32 --rounds $rounds
    benchmark maskrcnn --models configs/detection/mask-rcnn_{scalablevit-s,swin-t}_fpn_1x_coco.py \
        --sizes $photos --dtypes $whole --rounds $rounds
    benchmark upernet --models configs/segmentation/{scalablevit-s,swin-t}_upernet_8xb2-160k_ade20k-512x512.py \
        --sizes $scenes --dtypes $whole --rounds $rounds
    say 'Operators and their lower bound'
    "$python" tools/analysis_tools/roofline.py --models small swin-t --modes inference train --sizes $photos \
        --measure "$device" --out "$out/roofline.md"
    say "Wrote $out"
}

say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "error: $*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        echo "$usage"
        exit
        ;;
    collect | setup | measure) ;;
    *) set -- ;;
esac
if [ $# -lt 2 ]; then
    echo "$usage" >&2
    exit 2
fi
mkdir -p "$(dirname "$2")"
kit=$(realpath -m "$2") out=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
"$1" "${@:3}"
