#!/usr/bin/env bash
# DiT-MoE-XL/2-8E2A: 4.2 B parameters, 1.5 B of them active. Weights, gradients, AdamW and EMA: 92 GB, shared by all
# GPUs (ENGINE=zero2 or zero3 is DeepSpeed's way to the same).
#   DATA_PATH=/data/imagenet/train bash scripts/train_XL_2_8E2A.sh [flags of train.py]
#   OBJECTIVE=ddpm DATA_PATH=... bash scripts/train_XL_2_8E2A.sh
# All variables: scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train fsdp --model DiT-XL/2 --num_experts 8 --num_experts_per_tok 2 --activation-checkpointing "$@"
