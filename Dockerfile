# The project on NVIDIA's PyTorch container, with its torch, Transformer Engine and apex as they are.
# How to build and run it, also with enroot: docs/clusters.md

ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /workspace/megatron-dion
COPY . .
RUN docker/install.sh

# High enough to be nobody else's; the base may have its own user 1000.
ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" dion \
    && install --directory --owner dion /workspace/runs
USER ${USER_ID}

# Does this process have what it needs? It says nothing to other ranks, which may be training.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=3 \
    CMD ["megatron-dion", "doctor", "--no-collectives"]
CMD ["megatron-dion", "doctor"]

# Last, because a new revision would make all that follows anew.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-dion" \
    org.opencontainers.image.description="Dion for stock Megatron-core" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0"
