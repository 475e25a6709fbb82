#!/usr/bin/env bash
# DiT-MoE-S/2-8E2A: 199 M parameters, 72 M of them active. Weights, gradients, AdamW and EMA: 4.4 GB on each GPU.
#   DATA_PATH=/data/imagenet/train bash scripts/train_S_2_8E2A.sh [flags of train.py]
#   OBJECTIVE=ddpm DATA_PATH=... bash scripts/train_S_2_8E2A.sh
# All variables: scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train ddp --model DiT-S/2 --num_experts 8 --num_experts_per_tok 2 "$@"
