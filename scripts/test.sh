#!/usr/bin/env bash
# Check style and run the tests; arguments go to pytest:
#   bash scripts/test.sh                 bash scripts/test.sh -m "not slow" tests/test_moe.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python
export OMP_NUM_THREADS=1 # the tests' tensors are too small to share among threads

"$python" -m ruff check .
"$python" -m ruff format --check .
# More workers only if the machine has cores for them: -n 8. They take the files in the order of tests/conftest.py.
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@"
