# docker build --tag mmscalablevit .                          for CPUs
# docker build --tag mmscalablevit --build-arg DEVICE=gpu .   for NVIDIA GPUs; run it with --gpus all
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS cpu
ENV TORCH="torch==2.12.0 torchvision==0.27.0 --index-url https://download.pytorch.org/whl/cpu"

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS gpu
# No GPU is seen while the image is built: used only if there is no compiled wheel of mmcv.
ENV TORCH="torch==2.12.0 torchvision==0.27.0" FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="7.5 8.0 8.6 9.0+PTX"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${DEVICE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/mmscalablevit PATH=/opt/mmscalablevit/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /workspace
COPY . .
RUN make env
CMD ["bash"]
