#!/usr/bin/env bash
# From nothing to generated digits in a few minutes, on a CPU or a GPU, with no download but the packages:
#   bash scripts/quickstart.sh
#   STEPS=3000 bash scripts/quickstart.sh
# Each call trains anew in a folder of its own; two calls on the same machine print the same numbers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=${STEPS:-800}
samples=${SAMPLES:-1000}
results=${RESULTS:-results/quickstart}
data=${DATA:-data/digits}

python=${QUICKSTART_PYTHON:-.venv/bin/python} # benchmarks.quickstart names the one that runs it
[[ -n ${QUICKSTART_PYTHON:-} ]] || bash scripts/setup.sh
# At this size a second thread gains nothing, and on a busy machine threads that wait for each other cost a lot.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "== Data: 1797 handwritten digits of 8x8 pixels, half of them to train on"
"$python" -m scripts.digits write "$data"

echo "== Training: a diffusion transformer with 4 experts per layer, 2 of them for each token, for $steps steps"
"$python" train.py \
  --model DiT-Nano/2 --num_experts 4 --num_experts_per_tok 2 \
  --data-path "$data/train" --vae-path none --image-size 8 --num-classes 10 --flip False \
  --rf --global-batch-size 64 --max-steps "$steps" --lr 4e-3 --warmup-steps 20 --timestep-shift 2 --ema-decay 0.99 \
  --global-seed 0 --deterministic --num-workers 0 --log-every 50 --ckpt-every "$steps" --results-dir "$results"
runs=("$results"/[0-9]*/)
run=${runs[${#runs[@]} - 1]%/} # folders are numbered: the last is the newest

sampling=(--cfg-scale 1.5 --num-sampling-steps 25)
echo "== Sampling: a picture with 8 of each digit"
"$python" sample.py --ckpt "$run" "${sampling[@]}" --images-per-class 8 --png False --output "$run/samples"

echo "== Result: the course of training, then $samples samples against real digits that were not trained on"
"$python" -m scripts.digits curve "$run/metrics.jsonl"
"$python" calculate_metrics.py eval "$run" "${sampling[@]}" --num-samples "$samples" --labels balanced --seed 1 \
  --features pixels --ref "$data/held-out" --train "$data/train" --batch-size 250 --output "$run/metrics.json"
cat <<END
picture $run/samples/grid.png (a row for each digit)
run     $run (checkpoint, log, TensorBoard)

Go on from here:
  source .venv/bin/activate
  # other digits, stronger guidance
  python sample.py --ckpt $run --class-labels 3 1 4 1 5 --cfg-scale 3
  # train longer
  STEPS=3000 bash scripts/quickstart.sh
  # the smallest published model, on ImageNet
  DATA_PATH=/data/imagenet/train bash scripts/train_S_2_8E2A.sh
END
