# syntax=docker/dockerfile:1
# The GPU image: an NGC PyTorch base for CUDA, NCCL, nvcc and the network's libraries, and our own
# environments beside the base's, because vLLM wants the torch it was built for. docs/cluster.md
# says how to build it, what of it was checked, and what was not.
#
#   docker build --tag prorl_nemo .                     the GPU image
#   docker build --target test .                        the CPU stage: installs and runs every test
#   docker build --target bridge --tag prorl_bridge .   with megatron-bridge and nemo-run as well

ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE=python:3.11-slim-bookworm


# ---- CPU: the environment of a fresh clone, and its tests ---------------------------------------
FROM ${CPU_BASE} AS test
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 prorl \
    && install --directory --owner prorl /src
USER 1000
WORKDIR /src
COPY --chown=prorl Makefile pyproject.toml README.md ./
COPY --chown=prorl requirements requirements
COPY --chown=prorl prorl_nemo/__init__.py prorl_nemo/__init__.py
RUN make setup PYTHON=python3
COPY --chown=prorl . .
RUN make test


# ---- GPU: what takes long and changes rarely ----------------------------------------------------
FROM ${GPU_BASE} AS environment
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The base constrains pip to its own torch.
ENV PIP_CONSTRAINT=""
# The base's own torch must not be found by ours, nor by what is compiled against ours.
ENV LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64
# Ubuntu's Python makes no environment without python3-venv, which the base may lack.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements /tmp/requirements
# torch first: Transformer Engine's extension is compiled against it, for Hopper and Blackwell.
RUN python3 -m venv /opt/prorl \
    && /opt/prorl/bin/pip install --constraint /tmp/requirements/constraints-gpu.txt \
       torch ninja numpy packaging setuptools pybind11==3.1.0 wheel==0.48.0 \
    && NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100" MAX_JOBS=8 \
       /opt/prorl/bin/pip install --no-build-isolation \
       --constraint /tmp/requirements/constraints-gpu.txt --requirement /tmp/requirements/gpu.txt \
    && /opt/prorl/bin/pip check


# ---- GPU: the project ---------------------------------------------------------------------------
FROM ${GPU_BASE} AS gpu
# bubblewrap is the sandbox for code that models write; where the host forbids namespaces, Landlock
# takes its place (docs/rewards.md).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 prorl
COPY --from=environment /opt/prorl /opt/prorl
COPY --chown=prorl . /opt/prorl_nemo
RUN /opt/prorl/bin/pip install --no-cache-dir --no-deps --no-build-isolation \
      --editable /opt/prorl_nemo
# hadolint ignore=DL3064
ENV PATH=/opt/prorl/bin:${PATH} \
    LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    PIP_CONSTRAINT="" \
    TOKENIZERS_PARALLELISM=false \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001
WORKDIR /opt/prorl_nemo
CMD ["prorl", "--help"]


# ---- GPU: other model families ------------------------------------------------------------------
FROM gpu AS bridge
# hadolint ignore=DL3066
USER root
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m venv /opt/bridge \
    && /opt/bridge/bin/pip install --no-cache-dir --constraint requirements/constraints-bridge.txt \
       torch ninja numpy packaging setuptools pybind11==3.1.0 wheel==0.48.0 \
    && NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100" MAX_JOBS=8 \
       /opt/bridge/bin/pip install --no-cache-dir --no-build-isolation \
       --constraint requirements/constraints-bridge.txt --requirement requirements/bridge.txt
USER 10001


# What `docker build` makes without --target.
FROM gpu
