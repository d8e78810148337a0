#!/usr/bin/env bash
# Everything a GPU machine is for, in one call of less than nine minutes and without a network:
# build, tests/gpu, compute-sanitizer, benchmarks, a short profile.
#
#   bench/gpu/run.sh [a stage or more: build test memcheck racecheck bench profile]
#
# Needs python3 with torch, numpy, pytest, pybind11; cmake, ninja, nvcc. Results go to $OUT/<gpu> where OUT
# is set, otherwise to bench/results/<gpu>. A stage that fails is noted and the next one runs; the exit
# code is the number of stages that failed.
# shellcheck disable=SC2329  # the stages are called by name
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

total=530 # seconds for all stages
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test memcheck racecheck bench profile)

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || { echo "run.sh: nvidia-smi shows no GPU" >&2; exit 1; }
name=$(echo "$gpu" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9.-')
out=${OUT:-bench/results}/$name
mkdir -p "$out" || exit 1
log=$out/run.log
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD

{
  date -u +%Y-%m-%dT%H:%M:%SZ
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm --format=csv
  nvcc --version | tail -n 2
  python3 -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
  python3 -c 'import cupy; print("cupy", cupy.__version__)'
  nproc
} >"$out/machine.txt" 2>&1
: >"$log"

stage_build() { # machine code for this GPU alone
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) FORCE_CUDA=1 \
    cmake -S . -B build/gpu -G Ninja -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" \
    -DPython_EXECUTABLE="$(python3 -c 'import sys; print(sys.executable)')" &&
    cmake --build build/gpu --parallel "$(nproc)" && cmake --install build/gpu --prefix . &&
    python3 -c 'import noisyseg_fast; print(noisyseg_fast.build_info())'
}

stage_test() { python3 -m pytest tests/gpu -p no:cacheprovider --durations=15 -rs; }

# torch's cache would hide an overrun inside one large allocation
sanitizer() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    --kernel-regex kns=noisyseg python3 -m pytest tests/gpu -m small -p no:cacheprovider
}
stage_memcheck() { sanitizer memcheck; }
stage_racecheck() { sanitizer racecheck; }

stage_bench() { python3 -m bench --minutes 2.5 --out "$out"; }

stage_profile() {
  if command -v ncu >/dev/null; then
    ncu --clock-control none --kernel-name-base demangled -k regex:noisyseg \
      --section SpeedOfLight --section LaunchStats --section Occupancy python3 bench/gpu/operations.py
  elif command -v nsys >/dev/null; then
    nsys profile --force-overwrite true --stats true -o build/profile python3 bench/gpu/operations.py
  else
    echo "neither ncu nor nsys is here"
  fi
}

failed=0
run_stage() { # name, seconds at most
  local left=$((total - SECONDS)) limit=$2 begin=$SECONDS code=0
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -le 0 ]; then
    echo "$1: no time left" | tee -a "$log"
    failed=$((failed + 1))
    return
  fi
  echo "=== $1" >>"$log"
  timeout --kill-after=5 "$limit" bash -c "stage_$1" >>"$log" 2>&1 || code=$?
  [ "$code" -eq 0 ] || failed=$((failed + 1))
  echo "$1: $([ "$code" -eq 0 ] && echo ok || echo "failed with code $code") in $((SECONDS - begin)) s of $limit" |
    tee -a "$log"
}
export out
export -f stage_build stage_test sanitizer stage_memcheck stage_racecheck stage_bench stage_profile

for stage in "${stages[@]}"; do
  case $stage in
    build) run_stage build 130 ;;
    test) run_stage test 160 ;;
    memcheck | racecheck) run_stage "$stage" 60 ;;
    bench) run_stage bench 180 ;;
    profile) run_stage profile 45 ;;
    *) echo "run.sh: unknown stage $stage" >&2; failed=$((failed + 1)) ;;
  esac
done
# What was predicted before, beside what was measured now.
python3 -m bench.gpu.predict --compare "$out" 2>&1 | tee "$out/predictions.md" | tail -n 60
grep -E "passed|failed|ERROR SUMMARY|RACECHECK SUMMARY" "$log" | tail -n 20
exit "$failed"
