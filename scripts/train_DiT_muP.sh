#!/usr/bin/env bash
# DiT-muP: find the learning rate on narrow models, train the wide one with it. Heads of 72, depth 28, base width 288.
# As published: DDPM, batch 256, 40 epochs for each narrow model, 480 for the wide one (width 1152: the sizes of DiT-XL/2).
#   DATA_PATH=/data/imagenet/train bash scripts/train_DiT_muP.sh search          # 15 narrow runs, then their last losses
#   DATA_PATH=/data/imagenet/train LOGLR=-10 bash scripts/train_DiT_muP.sh target [flags of train.py]
#   HEADS="2 4" LOGLRS="-10 -9" DATA_PATH=... bash scripts/train_DiT_muP.sh search --num_experts 8   # a mixture's
# HEADS, LOGLRS    widths in heads, and learning rates as powers of 2, that are searched
# LOGLR            of the target (-10, the best one as published), whose heads are TARGET_HEADS (16)
# All other variables: scripts/_launch.sh
OBJECTIVE=${OBJECTIVE:-ddpm} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} VAE_PATH=${VAE_PATH:-ema}
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

what=${1:-}
[[ $# -gt 0 ]] && shift
results=${RESULTS_DIR:-$root/results/DiT_muP-$OBJECTIVE}

# A run in a folder of its own: `one HEADS LOGLR EPOCHS flags...`
one() {
  local heads=$1 loglr=$2 epochs=$3
  shift 3
  RESULTS_DIR=$results/h$heads-loglr$loglr train ddp \
    --mup --num_heads "$heads" --loglr "$loglr" --epochs "$epochs" "$@"
}

case $what in
  search)
    for heads in ${HEADS:-2 4 8}; do
      for loglr in ${LOGLRS:--13 -12 -11 -10 -9}; do one "$heads" "$loglr" 40 "$@"; done
    done
    echo "== the last loss of each run in $results"
    for log in "$results"/h*-loglr*/*/log.txt; do
      [[ -e $log ]] || continue
      echo "$(basename "$(dirname "$(dirname "$log")")") $(grep -o 'step [0-9/]*  loss [0-9.naif]*' "$log" | tail -n 1)"
    done
    ;;
  target) one "${TARGET_HEADS:-16}" "${LOGLR:--10}" 480 "$@" ;;
  *) echo "say what: search (narrow models) or target (the wide one)" >&2 && exit 2 ;;
esac
