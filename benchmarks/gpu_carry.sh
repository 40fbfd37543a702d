#!/usr/bin/env bash
# Prepares, on a machine with a network, what a GPU machine without one lacks, and prints the command to run there.
#
#   bash benchmarks/gpu_carry.sh [--python PYTHON] [--arch 90] [--wheels "NAME ..."]
#
# .carry/ gets wheels for that Python, and rft_fast/_native built by nvcc for that GPU's architecture (90: H100 and
# H200), which needs GLIBC 2.34 and no driver. PYTHON is one of the version that the GPU machine has, with its
# headers; by default the first 3.12 that is found. Copy the checkout with .carry/ there.
set -euo pipefail
cd "$(dirname "$0")/.."

python='' arch=90 wheels='open_clip_torch ftfy wcwidth'
while (($#)); do
  case $1 in
    --python | --arch | --wheels)
      [[ $# -gt 1 ]] || { echo "gpu_carry.sh: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" %s "$2" && shift 2 ;;
    *) echo 'usage: bash benchmarks/gpu_carry.sh [--python PYTHON] [--arch 90] [--wheels "NAME ..."]' >&2; exit 2 ;;
  esac
done
runs() { "$1" -c '' 2>/dev/null; }  # a shim on the PATH may lead nowhere
if [[ $python ]]; then
  runs "$python" || { echo "gpu_carry.sh: $python does not run" >&2; exit 2; }
else
  for found in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    runs "$found" && python=$found && break
  done
  [[ $python ]] || { echo 'gpu_carry.sh: no Python 3.12 was found; name one with --python' >&2; exit 2; }
fi
facts='import sys, sysconfig; print("%d.%d" % sys.version_info[:2], sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include"))'
read -r version suffix headers < <("$python" -c "$facts")
[[ -e $headers/Python.h ]] || { echo "gpu_carry.sh: $python has no headers ($headers/Python.h); name another with --python" >&2; exit 2; }

rm -rf .carry && mkdir -p .carry/wheels
platforms=()
for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
# shellcheck disable=SC2086 # names are words
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 -d .carry/wheels $wheels

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
RFT_NATIVE=1 RFT_CUDA=1 RFT_CUDA_ARCH=$arch "$scratch/venv/bin/python" setup.py -q build_ext \
  --build-lib "$scratch/lib" --build-temp "$scratch/temp" >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; exit 1; }
cp "$scratch/lib/rft_fast/_native$suffix" .carry/

du -sh .carry
cat <<END

Carry .carry/ with the checkout. There, with Python $version, in one command:

  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .carry/wheels/*.whl && export PYTHONPATH=/tmp/site && cp .carry/_native$suffix rft_fast/ && bash benchmarks/gpu.sh --quick OUT
END
