#!/usr/bin/env bash
# DiT-MoE-G/2-16E2A: 16.5 B parameters, 3.2 B of them active. Weights, gradients, AdamW and EMA: 363 GB, shared by all
# GPUs (ENGINE=zero3 is DeepSpeed's way to the same). With few images per GPU it is cheaper to move tokens to the experts
# than experts to the tokens: add --expert-parallel 8 to deal the experts over the GPUs of a machine.
#   DATA_PATH=/data/imagenet/train bash scripts/train_G_2_16E2A.sh [flags of train.py]
#   OBJECTIVE=ddpm DATA_PATH=... bash scripts/train_G_2_16E2A.sh
# All variables: scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train fsdp --model DiT-G/2 --num_experts 16 --num_experts_per_tok 2 --activation-checkpointing "$@"
