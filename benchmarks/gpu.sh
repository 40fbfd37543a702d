#!/usr/bin/env bash
# All that needs a GPU, in two runs of less than ten minutes each. The first builds the kernels, tests them, searches
# them for wrong memory accesses and races, and measures them; the second (--sweeps) tests and measures whole
# sweeps: CUDA graphs, streamed images, precisions. No step stops the next.
#
#   bash benchmarks/gpu.sh [--sweeps] [--only STEP,...] [--device cuda|cpu] [OUT]
#   bash benchmarks/gpu.sh [--sweeps] --list
#
# OUT, by default benchmarks/results/<date>-<gpu>, gets summary.json, rows.json (every round), table.md and log.txt.
# What matters most comes first: a step begins only while there is time left (GPU_SECONDS, by default 560, for all).
# Needs Python with torch, triton, pytest, pytest-benchmark, scipy, pybind11 and ninja, and nvcc; installs nothing.
# --device cpu runs the steps that need no GPU, to test this script.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

device=cuda only='' list='' out='' sweeps=''
while (($#)); do
  case $1 in
    --only) only=$2 && shift 2 ;;
    --device) device=$2 && shift 2 ;;
    --sweeps) sweeps=1 && shift ;;
    --list) list=1 && shift ;;
    -*) echo "usage: bash benchmarks/gpu.sh [--sweeps] [--list] [--only STEP,...] [--device cuda|cpu] [OUT]" >&2 && exit 2 ;;
    *) out=$1 && shift ;;
  esac
done

# The whole run ends by then, whatever its steps' own limits allow.
deadline=${GPU_SECONDS:-560}
steps=,
export PATH=$PATH:/usr/local/cuda/bin  # compute-sanitizer and nvcc, where they are not found otherwise
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
python=$(command -v python3 || command -v python)

if [[ ! $list && ! $out ]]; then
  name=$device
  [[ $device == cpu ]] || name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
  out=benchmarks/results/$(date +%F)-${name:-gpu}${sweeps:+-sweeps}
fi
# What the steps leave lies in OUT, so that a run that is cut off leaves it, too.
raw=$out/raw
if [[ ! $list ]]; then
  [[ ! -e $raw ]] || mv "$raw" "$raw-$(date +%s)"  # of a run that was cut off
  mkdir -p "$raw"
  : >"$raw/log.txt"
fi

# step NAME SECONDS COMMAND...: runs, times and records one step.
step() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  steps+=$name,
  if [[ $list ]]; then
    printf '%-10s %3ss  %s\n' "$name" "$limit" "$*"
    return
  fi
  [[ ! $only || ,$only, == *,$name,* ]] || return
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit < 5)); then
    code=-1
  else
    printf '\n== %s: %s\n' "$name" "$*" >>"$raw/log.txt"
    # What comes too late is not begun, and what is interrupted still writes what it has.
    STOP_AT=$(($(date +%s) + limit - 20)) timeout --signal=INT --kill-after=12 "$limit" "$@" >"$raw/$name.out" 2>&1
    code=$?
    cat "$raw/$name.out" >>"$raw/log.txt"
  fi
  printf '{"step": "%s", "code": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" $((SECONDS - start)) "$limit" >>"$raw/steps.jsonl"
  printf '%-10s %4ss  exit status %s\n' "$name" $((SECONDS - start)) "$code"
}

tests() {
  local name=$1 limit=$2 workers=()
  # Most of the time goes into compiling hundreds of variants, which processes can share.
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist worksteal)
  step "$name" "$limit" env OMP_NUM_THREADS=2 "$python" -m pytest -q -rs -p no:cacheprovider "${workers[@]}" \
    "--junitxml=$raw/$name.xml" "tests/test_$name.py"
}

bench() {
  step "$1" "$2" "$python" -m pytest -q -rs -p no:cacheprovider --device "$device" -k "$3" \
    "--benchmark-json=$raw/$1.json" "--junitxml=$raw/$1.xml" benchmarks/bench_kernels.py
}

# Goals, met or missed, are read from the file.
sweep_bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" benchmarks/bench_sweep.py --device "$device" \
    --out "$raw/$name.json" "$@"
}

sanitize() {
  # Every tensor is an allocation of its own, so that an access beyond its end is one to unowned memory.
  # Errors that a library asks for and handles are none.
  step "$1" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --report-api-errors no "$python" benchmarks/gpu_program.py --device "$device"
}

cuda() { [[ $device != cpu || $list ]]; }

if cuda; then
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' ')
  step machine 20 nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm --format=csv
  step build 200 env RFT_NATIVE=1 RFT_CUDA=1 "RFT_CUDA_ARCH=${arch% }" "$python" setup.py build_ext --inplace
fi
if [[ $sweeps ]]; then
  tests graphs 90
  arch=ViT-B-32 large=ViT-L-14
  cuda || arch=tiny large=tiny
  sweep_bench sweep_b 130 --arch "$arch" --part layer-sharpness busy --draws 8 --layers 4 --rounds 2
  sweep_bench sweep_l 160 --arch "$large" --part layer-sharpness busy --draws 6 --rounds 2
  sweep_bench scaling 110 --arch "$arch" --part layers interpolation scaling --rounds 2 --figure "$raw/scaling.png"
  tests evaluate 120
  tests walk 120
  tests precision 90
  step precisions 90 "$python" benchmarks/precision.py --device "$device" --out "$raw/precisions.json"
else
  step backends 60 "$python" benchmarks/gpu_program.py --device "$device" --backends
  step program 60 "$python" benchmarks/gpu_program.py --device "$device"
  bench host 40 host
  bench large 150 64M
  tests kernels 150
  if cuda; then
    sanitize memcheck
    sanitize racecheck
  fi
  tests triton 120
  bench vit_l 100 ViT-L-14
  tests torch_library 120
  tests path 60
  bench layer 60 'layer and not compile'
  bench vit_b 80 ViT-B-32
  step sweep 60 "$python" -m rft_fast.sweep interpolation --device "$device" --samples 200 --out "$raw/sweep"
fi

[[ $list ]] && exit
for name in ${only//,/ }; do
  [[ $steps == *,$name,* ]] || {
    [[ -e $raw/steps.jsonl ]] || rm -r "$raw"  # nothing ran
    echo "gpu.sh: there is no step $name here; see --list" >&2 && exit 2
  }
done
mv "$raw/log.txt" "$out/log.txt"
[[ ! -e $raw/scaling.png ]] || mv "$raw/scaling.png" "$out/"
"$python" benchmarks/gpu_report.py "$raw" "$out"
code=$?
# An older summary is no sign that this run's report was written.
[[ ! $out/summary.json -nt $raw/steps.jsonl ]] || rm -rf "$raw"
exit $code
