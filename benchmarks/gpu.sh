#!/usr/bin/env bash
# What a CUDA machine changes, in one command of less than nine minutes that needs no network: TensorRT and CUDA beside
# PyTorch, the roofline, detectors, the service and the batch job. Arguments are those of `python -m benchmarks gpu`:
# `benchmarks/gpu.sh --dry` runs it all on a CPU, with tiny settings.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks gpu "$@"
