# syntax=docker/dockerfile:1
# Three images:
#
#   docker build --tag ensembler .                      # for CPUs: the last stage
#   docker build --tag ensembler:gpu --target gpu .     # with the CUDA kernels and Triton
#   docker build --tag ensembler:vllm --target vllm .   # `ensembler serve`, on vLLM's own image
#
#   docker run --rm --network none ensembler generate demo --prompt "Ann has 5 pears."
#   docker run --rm --gpus all --volume "$PWD:/work" ensembler:gpu generate my-ensemble --prompt "..."
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" --publish 8000:8000 ensembler:vllm my-ensemble
#
# None of them was built yet, and no GPU was used: the pip lines were resolved, those for CPUs run, on Python 3.11. Of
# vLLM's image only the Dockerfile of another version was read.
# GPUs need a driver for CUDA 13.0, which torch 2.13 is built for.

FROM python:3.11-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# For --compile and Triton.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ensembler
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY ensembler ensembler
COPY kernels kernels
ENTRYPOINT ["ensembler"]
CMD ["--help"]


FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY kernels/ensembler_kernels/cuda /cuda
RUN python3 /cuda/build.py


FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[eval,vision]'
COPY --from=cuda /cuda/_build /usr/local/lib/python3.11/site-packages/ensembler_kernels/cuda/_build
WORKDIR /work
USER 1000


FROM vllm/vllm-openai:v0.32.0 AS vllm
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ensembler ensembler
COPY kernels kernels
# What vLLM's image has stays as it is: torch and transformers are those that vLLM was built for. Packages without a
# version, which were installed from files, are left out of the constraints.
RUN uv pip freeze --system > /tmp/constraints.txt \
    && sed --in-place '/==/!d' /tmp/constraints.txt \
    && uv pip install --system --no-cache --constraint /tmp/constraints.txt . \
    && rm /tmp/constraints.txt
WORKDIR /work
# The image's own user `vllm`, who can write to this home: caches of compiled kernels and of the hub.
ENV HOME=/home/vllm
USER 2000:0
EXPOSE 8000
HEALTHCHECK --start-period=30m --interval=30s --timeout=10s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["ensembler", "serve"]
CMD ["demo"]


FROM base AS cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && pip install --constraint constraints.txt '.[eval,vision]'
WORKDIR /work
USER 1000
