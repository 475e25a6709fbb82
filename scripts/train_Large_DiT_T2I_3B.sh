#!/usr/bin/env bash
# Large-DiT-T2I-3B: 5.0 B parameters, from captions that LLaMA-2-7B reads. Weights, gradients, AdamW and EMA: 101 GB.
# As published: DDPM, batch 512, QK-norm, gradients clipped at 2, 3,000,000 steps.
#   DATA_PATH=/data/captioned bash scripts/train_Large_DiT_T2I_3B.sh [flags of train.py]
#   TEXT_ENCODER=/models/Llama-2-7b-hf DATA_PATH=... bash scripts/train_Large_DiT_T2I_3B.sh
# All variables: scripts/_launch.sh
OBJECTIVE=${OBJECTIVE:-ddpm} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512} VAE_PATH=${VAE_PATH:-ema}
condition="--lm ${TEXT_ENCODER:-llama}"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train fsdp --model DiT_Llama_3B_patch2 --qk-norm --grad-clip 2 --max-steps 3000000 --ckpt-every 10000 \
  --activation-checkpointing "$@"
