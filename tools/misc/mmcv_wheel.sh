# Sourced by setup_env.sh: compiled wheels of mmcv, which its maintainers keep in a folder for each pair of
# device and PyTorch. MMCV_WHEELS may name a mirror or a local copy.
MMCV_WHEELS=${MMCV_WHEELS:-https://mmwheels.onedl.ai}
# Folders to look into for someone who has no PyTorch yet, newest first, and what fits them.
TORCH_WITH_WHEELS=(
    'cu130-torch2120 torch==2.12.0 torchvision==0.27.0'
    'cu128-torch280 torch==2.8.0 torchvision==0.23.0'
)

# mmcv_wheel COMMAND FOLDER...: pip's install or download, soon at an end where there is no network.
mmcv_wheel() {
    "$python" -m pip --quiet --quiet --disable-pip-version-check "$1" --timeout 10 --retries 0 --no-deps \
        --no-index --find-links "$MMCV_WHEELS/$2/simple/onedl-mmcv/index.html" \
        --find-links "$MMCV_WHEELS/simple/$2/index.html" --only-binary :all: "${@:3}" \
        'onedl-mmcv>=2.3.6,<2.4' 2> /dev/null
}

# Prints the requirements of a PyTorch for which this Python has a wheel; nothing if there is none.
torch_with_wheel() {
    local entry folder
    folder=$(mktemp -d)
    for entry in "${TORCH_WITH_WHEELS[@]}"; do
        if mmcv_wheel download "${entry%% *}" --dest "$folder"; then
            echo "${entry#* }"
            break
        fi
    done
    rm -r "$folder"
}

# The folder of the PyTorch that is installed.
wheel_folder() {
    "$python" -c '
import torch
device = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu"
print(device + "-torch" + "".join(torch.__version__.split(".")[:2]) + "0")'
}
