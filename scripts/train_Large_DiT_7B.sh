#!/usr/bin/env bash
# Large-DiT-7B: 7.3 B parameters, all of them active. Weights, gradients, AdamW and EMA: 146 GB.
# As published: DDPM, batch 512, QK-norm, gradients clipped at 2, 3,000,000 steps.
#   DATA_PATH=/data/imagenet/train bash scripts/train_Large_DiT_7B.sh [flags of train.py]
#   OBJECTIVE=rf DATA_PATH=... bash scripts/train_Large_DiT_7B.sh --num_experts 8
# All variables: scripts/_launch.sh
OBJECTIVE=${OBJECTIVE:-ddpm} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} VAE_PATH=${VAE_PATH:-ema}
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train fsdp --model Large-DiT-7B/2 --qk-norm --grad-clip 2 --max-steps 3000000 --ckpt-every 10000 --activation-checkpointing "$@"
