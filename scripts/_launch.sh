# What all the published runs share; sourced by train_*.sh and sample.sh, which hold what differs.
#
# Variables, for training:
#   DATA_PATH          folder of training images, one folder per class, or with captions (needed)
#   FEATURE_PATH       features of extract_features.py, in its place
#   OBJECTIVE          rf (rectified flow, default) or ddpm
#   GLOBAL_BATCH_SIZE  images per step over all GPUs (1024); with few GPUs add --accum_iter N
#   ENGINE             who holds what, where the choice of the script does not suit: ddp, sdp, fsdp (train.py
#                      --data-parallel) or zero1, zero2, zero3, zero3_offload (train_deepspeed.py with that file of config/)
#   RESULTS_DIR        where run folders go (results/<size>-<objective> in the repository)
#   VAE_PATH           autoencoder, a folder or a name (default of train.py)
# and for the processes:
#   NPROC_PER_NODE     processes per machine (one per GPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: run the same command on each with its own NODE_RANK
# All further arguments go to the trainer, after the ones here, so they win:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 DATA_PATH=... bash scripts/train_G_2_16E2A.sh --expert-parallel 8
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v torchrun >/dev/null || PATH=$root/.venv/bin:$PATH # where no other environment is active

# torchrun for one machine (any free port, so that runs do not meet) or several.
launch() {
  local machines=(--standalone)
  if [[ ${NNODES:-1} != 1 ]]; then
    : "${NODE_RANK:?set it to the number of this machine, 0 to NNODES-1}"
    : "${MASTER_ADDR:?set it to the address of machine 0}"
    machines=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
      --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  torchrun "${machines[@]}" --nproc-per-node "${NPROC_PER_NODE:-auto}" "$@"
}

# The value of --rf for an objective.
is_flow() {
  case $1 in
    rf) echo True ;;
    ddpm) echo False ;;
    *) echo "OBJECTIVE must be rf or ddpm, got '$1'" >&2 && return 2 ;;
  esac
}

# Train with the hyper-parameters of the paper: batch 1024, AdamW at 1e-4 (its default), no weight decay, EMA 0.9999, flips.
# The same command again goes on from the newest checkpoint.
#   train ENGINE flags...    with the engine that suits the size
# A script of images with captions says so in `condition`, in place of the classes.
train() {
  [[ -n ${FEATURE_PATH:-} ]] || : "${DATA_PATH:?set it to the folder of training images, one folder per class}"
  local objective=${OBJECTIVE:-rf} size rf trainer data=(--data-path "${DATA_PATH:-}")
  [[ -n ${FEATURE_PATH:-} ]] && data=(--feature-path "$FEATURE_PATH")
  rf=$(is_flow "$objective")
  size=$(basename "$0" .sh)
  case ${ENGINE:-$1} in
    ddp | sdp | fsdp) trainer=("$root/train.py" --data-parallel "${ENGINE:-$1}") ;;
    zero*) trainer=("$root/train_deepspeed.py" --deepspeed_config "$root/config/${ENGINE:-$1}.json") ;;
    *) echo "ENGINE must be ddp, sdp, fsdp or zero1, zero2, zero3, zero3_offload, got '$ENGINE'" >&2 && return 2 ;;
  esac
  shift
  launch "${trainer[@]}" \
    "${data[@]}" ${VAE_PATH:+--vae-path "$VAE_PATH"} --image-size 256 ${condition---num-classes 1000} \
    --results-dir "${RESULTS_DIR:-$root/results/${size#train_}-$objective}" --resume auto \
    --rf "$rf" --global-batch-size "${GLOBAL_BATCH_SIZE:-1024}" \
    --lr-schedule constant --weight-decay 0 --ema-decay 0.9999 "$@"
}
