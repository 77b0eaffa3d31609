#!/bin/bash
# Builds Transformer Engine from the package index into a virtual environment of its own, on a
# machine without a GPU and without a CUDA toolkit. Its kernels do not run there; its FP8 tensors
# and quantizers are Python objects that do, and the tests in tests/transformer_engine use them.
#
# usage: build_transformer_engine.sh [FOLDER]
#   FOLDER  the virtual environment to make (default: .venv-te); kept if it is complete
#
# An environment of its own, because megatron-core takes CUDA-only optimizers, norms and layers
# wherever it can import Transformer Engine. For a GPU, use a container that brings it, or
# `pip install --no-build-isolation "megatron-dion[te]"` (docs/fp8.md).

set -euo pipefail

VERSION=2.20.2
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$here/.venv-te}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
done="$folder/.transformer_engine_$VERSION"

if [[ -f $done && ! $here/constraints.txt -nt $done ]]; then
    echo "Transformer Engine $VERSION is in $folder"
    exit 0
fi

command -v g++ >/dev/null || {
    echo 'no g++ on PATH, which Transformer Engine is compiled with: install g++' >&2
    exit 1
}

python=$("$here/tools/find_python.sh")
echo "making $folder with $python: about 7 GB, 25 minutes of processor time"
"$python" -m venv --clear "$folder"
PATH="$folder/bin:$PATH"
export PATH

install() {
    python -m pip install --disable-pip-version-check --quiet -c "$here/constraints.txt" "$@"
}

echo '1/3 torch, megatron-core and the tests'
install -e "${here}[data,run,dev]"

# The headers that the extension includes: wheels of the CUDA toolkit that torch was built with.
echo '2/3 headers of CUDA, and what builds'
cuda=$(python -c 'import torch; print(torch.version.cuda)')
install ninja packaging pybind11 setuptools wheel 'nvidia-cudnn-frontend>=1.29' \
    "cuda-toolkit[cccl,crt,nvcc,nvrtc,profiler]==$cuda.*"
toolkit=$(python -c 'import nvidia; print(nvidia.__path__[0])')/cu${cuda%%.*}

export COMPILED_HEADERS="$folder/torch_headers.h"
printf '#include <%s>\n' torch/extension.h torch/torch.h ATen/cuda/CUDAContext.h \
    ATen/cuda/CUDAGeneratorImpl.h torch/csrc/distributed/c10d/ProcessGroup.hpp \
    >"$COMPILED_HEADERS"
compiler="$here/tools/compile_unoptimized.sh"

# nproc heeds OMP_NUM_THREADS, which make sets to 1.
jobs=${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)}

echo '3/3 Transformer Engine'
CC="$compiler" CXX="$compiler" \
    CUDA_HOME="$toolkit" \
    CPLUS_INCLUDE_PATH="$toolkit/include:$toolkit/include/cccl" \
    MAX_JOBS="$jobs" \
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
    python -m pip install --disable-pip-version-check --quiet --no-build-isolation \
    -c "$here/constraints.txt" "transformer-engine[core-cu${cuda%%.*},pytorch]==$VERSION"

python -c 'import torch, transformer_engine.pytorch'  # torch loads the libraries that it needs
touch "$done"
