#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that wants a GPU, in one run of at most eight minutes and without a network: builds the
# CUDA library, runs the GPU tests, looks for wrong accesses and races, and times the ops.
#
#   benchmarks/gpu_check.sh OUT
#
# OUT gets summary.txt, one log per part, results.jsonl and table.md, each written as it comes.
# PYTHON names the interpreter whose torch has CUDA (python3), SECONDS_IN_ALL the time (480).
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-480}))
failed=0
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 LYCHEE_CUDA=1
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

say() { echo "$*" | tee -a "$out/summary.txt"; }

# part NAME LIMIT KEEP COMMAND...: runs a command for at most LIMIT seconds, and leaves KEEP seconds
# to the parts that follow.
part() {
  local name=$1 limit=$2 left=$((deadline - SECONDS - $3)) begin=$SECONDS code
  shift 3
  if [ "$left" -lt 5 ]; then
    say "$name: left out, no time"
    failed=1
    return 1
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
  code=$?
  case $code in
    0) say "$name: passed in $((SECONDS - begin)) s" ;;
    124 | 137) say "$name: stopped after $((SECONDS - begin)) s" ;;
    *) say "$name: failed with status $code after $((SECONDS - begin)) s" ;;
  esac
  tail -n 3 "$out/$name.log" | sed "s/^/    $name: /" | tee -a "$out/summary.txt"
  [ "$code" -eq 0 ] || failed=1
  return "$code"
}

has() { "$python" -c "import $1" 2>/dev/null; }

describe() {
  git describe --always --dirty 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__,
      "CUDA", torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
  for package in triton numpy safetensors tokenizers transformers typer rich pytest ninja flashinfer; do
    has "$package" || echo "missing: $package"
  done
}

: >"$out/summary.txt"
describe 2>&1 | tee -a "$out/summary.txt"

if ! part build 240 200 "$python" setup.py build_ext --inplace; then
  say "Without the CUDA library, what follows is of the Triton kernels."
  LYCHEE_CUDA=0 part build_cpu 60 180 "$python" setup.py build_ext --inplace
fi

if has pytest; then
  # with names: where the time is up, the log says what failed until then
  tests=("$python" -m pytest -v --tb=short -p no:cacheprovider tests/kernels)
  workers=()
  if has xdist; then workers=(-n 8); fi
  part tests 90 160 "${tests[@]}" --durations=5 "${workers[@]}" -k cuda
  if command -v compute-sanitizer >/dev/null; then
    # Kernels of PyTorch are not looked at. Every allocation is one of its own, so that the first
    # access beyond it is found.
    sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9
      --kernel-name kns=lychee --print-limit 20)
    small=(-k "cuda and backends and not (billion or every_pair or schedule or bank_is_written)")
    part memcheck 90 130 "${sanitizer[@]}" --tool memcheck "${tests[@]}" "${small[@]}" &
    memcheck=$!
    part racecheck 90 130 "${sanitizer[@]}" --tool racecheck "${tests[@]}" "${small[@]}" &
    racecheck=$!
    wait "$memcheck" || failed=1
    wait "$racecheck" || failed=1
  else
    say "memcheck, racecheck: left out, there is no compute-sanitizer"
    failed=1
  fi
  # on their own: they compile for every combination of options
  part triton_tests 90 100 "${tests[@]}" --durations=5 "${workers[@]}" \
    -k "triton and not cuda and not absent_gpus"
else
  say "tests, memcheck, racecheck, triton_tests: left out, there is no pytest"
  failed=1
fi

left=$((deadline - SECONDS))
part benchmarks "$left" 0 "$python" benchmarks/gpu.py "$out" --seconds "$((left > 40 ? left - 30 : 10))"

if [ -f "$out/table.md" ]; then
  cat "$out/table.md"
fi
exit "$failed"
