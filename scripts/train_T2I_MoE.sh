#!/usr/bin/env bash
# DiT-MoE-L/2-8E2A from texts: rectified flow on images with captions, read by T5. Any row of sizes will do.
#   DATA_PATH=/data/captioned bash scripts/train_T2I_MoE.sh [flags of train.py]
#   FEATURE_PATH=features bash scripts/train_T2I_MoE.sh    # made by extract_features.py --text-encoder t5
#   TEXT_ENCODER=/models/clip DATA_PATH=... bash scripts/train_T2I_MoE.sh --model DiT-XL/2
# All variables: scripts/_launch.sh
condition=
[[ -n ${DATA_PATH:-} ]] && condition="--text-encoder ${TEXT_ENCODER:-t5}"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

train sdp --model DiT-L/2 --num_experts 8 --num_experts_per_tok 2 --activation-checkpointing "$@"
