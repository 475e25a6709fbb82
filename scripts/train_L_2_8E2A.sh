#!/usr/bin/env bash
# DiT-MoE-L/2-8E2A: 2.8 B parameters, 1.0 B of them active. Weights, gradients, AdamW and EMA: 62 GB, of which each GPU
# keeps the weights and its share of the rest (ENGINE=zero2 is DeepSpeed's way to the same).
#   DATA_PATH=/data/imagenet/train bash scripts/train_L_2_8E2A.sh [flags of train.py]
#   OBJECTIVE=ddpm DATA_PATH=... bash scripts/train_L_2_8E2A.sh
# All variables: scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train sdp --model DiT-L/2 --num_experts 8 --num_experts_per_tok 2 --activation-checkpointing "$@"
