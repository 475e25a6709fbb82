#!/usr/bin/env bash
# DiT-MoE-B/2-8E2A: 796 M parameters, 286 M of them active. Weights, gradients, AdamW and EMA: 18 GB on each GPU.
#   DATA_PATH=/data/imagenet/train bash scripts/train_B_2_8E2A.sh [flags of train.py]
#   OBJECTIVE=ddpm DATA_PATH=... bash scripts/train_B_2_8E2A.sh
# All variables: scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train ddp --model DiT-B/2 --num_experts 8 --num_experts_per_tok 2 "$@"
