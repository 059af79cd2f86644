#!/usr/bin/env bash
# Check diffuse on a machine with a GPU: its tests, three minutes of training, and short benchmarks, in eight minutes.
#
#   bash scripts/check_gpu.sh [--dry-run] IMAGES.zip
#
# IMAGES.zip holds 32x32 colour images, such as those of CIFAR-10. Results go to $OUT (default: outputs/gpu):
# summary.txt, a log of each step, metrics.csv and grid.png of the training, and benchmark.json.
# --dry-run does the same in miniature on a CPU. PYTHON names the interpreter (default: python3).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-outputs/gpu}
dry=false
if [[ ${1:-} == --dry-run ]]; then dry=true && shift; fi
if [[ ! -f ${1:-} ]]; then
  echo "check_gpu.sh: ${1:-IMAGES.zip}: is not a file; give a ZIP of 32x32 colour images" >&2
  exit 2
fi
images=$1
deadline=$((SECONDS + 470))
mkdir -p "$OUT"
: >"$OUT/summary.txt"
failed=()

# step NAME SECONDS COMMAND...: run a command within its own limit and the deadline, and keep its output.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  local left=$((deadline - SECONDS))
  if ((limit > left)); then limit=$left; fi
  if ((limit < 5)); then
    code=124
    echo "no time is left" >"$OUT/$name.log"
  else
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  fi
  local result=passed
  if ((code)); then
    result="FAILED (exit code $code)"
    if ((code == 124 || code == 137)); then result="FAILED (stopped after $limit s)"; fi
    failed+=("$name")
  fi
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$result" | tee -a "$OUT/summary.txt"
}

if $dry; then
  tests=("tests/test_gpu.py")
  train=(trainer=cpu model.channels=8 model.norm_groups=4 batch_size=4 max_steps=4 log_every=2 precision=fp32)
  sample=(device=cpu steps=2 num_samples=4)
  benchmark=(--device cpu train_step --rounds 1)
else
  mapfile -t tests < <(grep -rl 'mark\.gpu' tests --include='*.py')
  # Compiling takes most of the time of the tests, and several processes share it.
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then tests+=(-n 6); fi
  train=(trainer=gpu batch_size=128 max_time=180s preview_every=2000 log_every=100)
  sample=(device=cuda steps=50 num_samples=64)
  benchmark=(--device cuda sample train_step --rounds 2)
fi
runs=$OUT/runs
samples=$OUT/check_samples
rm -rf "$runs/check" "$samples" # of an earlier check

step machine 60 "$PYTHON" - <<'PY'
import platform, torch, lightning
print("python", platform.python_version(), "torch", torch.__version__, "lightning", lightning.__version__)
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory >> 20, "MiB")
PY
step tests 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"
step train 240 "$PYTHON" -m diffusion_cli train dataset=folder "dataset.path=$images" dataset.resolution=32 \
  model=unet_cifar10 name=check logger=csv "output_dir=$runs" "${train[@]}"
step sample 60 "$PYTHON" -m diffusion_cli sample run=check "output_dir=$runs" "output=$samples" "${sample[@]}"
step benchmark 180 "$PYTHON" scripts/benchmark.py --short --json "$OUT/benchmark.json" "${benchmark[@]}"

cp "$runs/check/metrics.csv" "$OUT/metrics.csv" 2>/dev/null
cp "$samples/grid.png" "$OUT/grid.png" 2>/dev/null
"$PYTHON" - "$OUT/metrics.csv" 2>/dev/null <<'PY' | tee -a "$OUT/summary.txt"
import csv, statistics, sys
with open(sys.argv[1], newline="") as file:
    rows = [row for row in csv.DictReader(file) if row.get("images_per_second")]
rates = [float(row["images_per_second"]) for row in rows]
print(f"training   {statistics.median(rates):.0f} images/s (median), loss {float(rows[-1]['loss']):.4f} at step {rows[-1]['step']}")
PY
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}; see $OUT/<name>.log" | tee -a "$OUT/summary.txt"
  exit 1
fi
echo "all passed; results: $OUT" | tee -a "$OUT/summary.txt"
