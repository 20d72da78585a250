#!/bin/bash
# Proves everything on a GPU in under 10 minutes; see gpu.py. PYTHON names the interpreter.
#
#     bash benchmarks/gpu.sh                      everything
#     bash benchmarks/gpu.sh --only tests         or sanitizer, micro, training; may be repeated
#     bash benchmarks/gpu.sh --device cpu         the same steps on CPU tensors, small: a dry run
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
