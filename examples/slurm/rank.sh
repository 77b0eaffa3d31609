#!/usr/bin/env bash
# One rank of pretrain.sbatch, started by srun; with LAUNCHER=torchrun first one torchrun per node,
# which starts this again for each of its ranks.

set -euo pipefail
# Until Megatron listens for the early signal, after some seconds of imports, it would kill a rank.
trap '' USR2

if [[ $LAUNCHER == torchrun && -z ${LOCAL_RANK:-} ]]; then
    # Slurm signals its tasks only, so torchrun has to pass the signal on, and to wait for the
    # checkpoint that follows; after its usual 30 s it would kill the ranks.
    exec python -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$GPUS_PER_NODE" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --shutdown-timeout 600 \
        --no-python bash "$0" "$@"
fi
# Megatron reads torchrun's variables, not Slurm's.
export RANK="${RANK:-$SLURM_PROCID}" WORLD_SIZE="${WORLD_SIZE:-$SLURM_NTASKS}"
export LOCAL_RANK="${LOCAL_RANK:-$SLURM_LOCALID}" LOCAL_WORLD_SIZE="$GPUS_PER_NODE"

# On Hopper and before, Megatron wants it for tensor and context parallelism; Blackwell takes any.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Compilers' caches, on the node's own disk: all nodes at once would overload a shared one.
cache=$NODE_TMP/compiled-$SLURM_JOB_ID
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"

# srun labels what all ranks print, in the job's log; here each has its own file. tee ends with the
# rank's output, after the rank.
export PYTHONUNBUFFERED=1
exec > >(trap '' INT TERM; exec tee -a "$RANK_LOGS/rank$RANK.log") 2>&1
exec python pretrain_gpt.py "$@"
