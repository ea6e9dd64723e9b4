#!/usr/bin/env bash
# What the trainer does on this machine's GPU, in one table and under eight minutes.
# Exit status: 0 all right, 1 something is wrong, 2 no GPU. `--rehearse`: small sizes, on CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
export PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
[[ "${1:-}" == --rehearse ]] && exec "$python" -m tools.gpu_check --rehearse
if ! nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none); nothing was checked" >&2
    exit 2
fi
exec timeout 480 "$python" -m tools.gpu_check "$@"
