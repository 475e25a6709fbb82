#!/usr/bin/env bash
# From prompts to pictures in some two minutes on a CPU, with no download but the packages:
#   bash scripts/quickstart_text.sh
#   STEPS=3000 bash scripts/quickstart_text.sh
# Scenes of one to four handwritten digits with captions; a text-to-image mixture of experts; prompts that ask for pairs of
# digits which no scene has in these places; and a judge that reads every cell.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=${STEPS:-850}
results=${RESULTS:-results/quickstart_text}
data=${DATA:-data/scenes}

python=${QUICKSTART_PYTHON:-.venv/bin/python}
[[ -n ${QUICKSTART_PYTHON:-} ]] || bash scripts/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as in quickstart.sh

echo "== Data: scenes of handwritten digits, with captions such as \"a seven left of a two at the top\""
"$python" -m scripts.digits compose "$data" --count "${SCENES:-12000}"

echo "== Training: a diffusion transformer that reads, with 4 experts per layer, for $steps steps"
"$python" train.py \
  --model DiT-Nano/2 --patch-size 4 --num_experts 4 --expert-ratio 1 --num_shared_experts 1 --text-encoder words \
  --data-path "$data" --vae-path none --image-size 16 --flip False --rf --timestep-shift 2 \
  --mup --lr 8e-3 --lr-schedule cosine --warmup-steps "$((steps < 50 ? steps : 50))" --grad-clip 1 --ema-decay 0.99 \
  --aux-loss-alpha 0.001 --global-batch-size 64 --max-steps "$steps" --global-seed 0 --num-workers 1 \
  --log-every 100 --ckpt-every "$steps" --results-dir "$results"
runs=("$results"/[0-9]*/)
run=${runs[${#runs[@]} - 1]%/}

echo "== Sampling: prompts for what no scene shows, and whether it is there"
sampling=(--cfg-scale 3 --num-sampling-steps 25 --batch-size 64 --png False)
"$python" sample.py --ckpt "$run" "${sampling[@]}" --prompt-file "$data/new.jsonl" --output "$run/samples"
"$python" -m scripts.digits judge "$run/samples/samples.npz" "$data/new.jsonl"
cat <<END
picture $run/samples/grid.png (the prompts are in $data/new.jsonl)
run     $run

Go on from here:
  source .venv/bin/activate
  python sample.py --ckpt $run --cfg-scale 3 --prompt "a seven left of a two at the top" "top left: a one; bottom right: a nine"
END
