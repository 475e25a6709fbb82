#!/usr/bin/env bash
# PixArt-alpha-muP on SA-1B in PixArt's layout: find the learning rate on narrow models, train the wide one with it.
# As published: DDPM, fp16, AdamW with weight decay 0.03 and eps 1e-10, gradients clipped at 0.01, 1000 steps of warmup.
#   DATA_PATH=data/SA1B bash scripts/train_PixArt_muP.sh search      # 4 heads, batch 1408, 5 epochs: 5 learning rates
#   DATA_PATH=data/SA1B LOGLR=-10 bash scripts/train_PixArt_muP.sh target [flags of train.py]    # 16 heads, batch 5632
#   DATA_PATH=data/SA1B bash scripts/train_PixArt_muP.sh standard    # PixArt-alpha itself, lr 2e-5 * sqrt(5632 / 256)
# Features of captions lie in DATA_PATH/caption_feature_wmask; where they do not, add --text-encoder t5.
# LOGLRS, LOGLR    learning rates as powers of 2 that are searched (-13 to -9), and that of the target (-10)
# All other variables: scripts/_launch.sh
OBJECTIVE=${OBJECTIVE:-ddpm} VAE_PATH=${VAE_PATH:-ema} condition=
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

what=${1:-}
[[ $# -gt 0 ]] && shift
results=${RESULTS_DIR:-$root/results/PixArt_muP-$OBJECTIVE}

# A run in a folder of its own: `one NAME BATCH flags...`
one() {
  local name=$1 batch=$2
  shift 2
  RESULTS_DIR=$results/$name GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-$batch} train ddp \
    --precision fp16 --activation-checkpointing --flip False --weight-decay 0.03 --decay-all --adam-eps 1e-10 \
    --grad-clip 0.01 --warmup-steps 1000 "$@"
}

case $what in
  search)
    for loglr in ${LOGLRS:--13 -12 -11 -10 -9}; do
      one "h4-loglr$loglr" 1408 --model PixArt-muP-4h/2 --loglr "$loglr" --epochs 5 --ckpt-every 10000 "$@"
    done
    ;;
  target) one "h16-loglr${LOGLR:--10}" 5632 --model PixArt-muP-16h/2 --loglr "${LOGLR:--10}" --epochs 30 --ckpt-every 20000 "$@" ;;
  standard) one standard 5632 --model PixArt-XL/2 --lr 9.4e-5 --epochs 30 --ckpt-every 20000 "$@" ;;
  *) echo "say what: search (narrow models), target (the wide one) or standard (without muP)" >&2 && exit 2 ;;
esac
