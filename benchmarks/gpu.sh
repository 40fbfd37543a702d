#!/usr/bin/env bash
# All that needs a GPU, in one call: proves, tests and measures the kernels and whole sweeps on this machine.
#
#   bash benchmarks/gpu.sh --quick OUT      at most 570 s: what matters most, for a GPU that is lent for minutes
#   bash benchmarks/gpu.sh OUT              everything, some two hours, for a GPU of your own
#   bash benchmarks/gpu.sh [--quick] --list
#
# Options: --only STEP,...   --seconds N (stop by then)   --device cuda|cuda:N|cpu (cpu: tiny models, to test this).
# OUT gets rows.jsonl (each measurement the moment it is there), summary.md (rewritten as it goes) and log.txt.
# benchmarks/gpu_carry.sh prepares what a machine without a network lacks. The work is done by gpu.py.
here=$(cd "$(dirname "$0")" && pwd) || exit
python=$(command -v python3 || command -v python) || { echo "gpu.sh: no python3 on the PATH" >&2; exit 2; }
exec "$python" "$here/gpu.py" "$@"
