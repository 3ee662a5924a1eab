#!/usr/bin/env bash
# Measures the package on one GPU, within nine minutes:
#
#   experiments/gpu/run.sh OUT [PHASE …]
#
# OUT/measurements.jsonl gets a line of JSON for each measurement as soon as it is taken. A phase that fails or runs out of time
# does not stop the next one. `python experiments/gpu/report.py OUT` writes the tables.
#
#   PYTHON   the interpreter, default python3
#   IMAGES   folder of images with captions for the phase `images`; drawn shapes without it
#   TINY=1   tiny sizes, to try the script on a CPU
set -u
out=${1:?usage: experiments/gpu/run.sh OUT [PHASE …]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$out"
export BENCHMARK_THREADS="${BENCHMARK_THREADS:-$(nproc)}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compiled}"

# Seconds of each phase. Their sum stays below nine minutes.
declare -A limits=([machine]=20 [decoding]=110 [training]=110 [peers]=60 [parity]=60 [images]=165)
phases=("$@")
[ ${#phases[@]} -gt 0 ] || phases=(machine decoding training peers parity images)
for phase in "${phases[@]}"; do
  limit=${limits[$phase]:?unknown phase $phase}
  [ -z "${TINY:-}" ] || limit=$((10 * limit)) # a CPU compiles slowly
  echo "== $phase, at most $limit s"
  timeout --kill-after=2 "$limit" "${PYTHON:-python3}" "$root/experiments/gpu/phase.py" "$phase" \
    --output "$out" --seconds "$((limit - 5))" ${TINY:+--tiny} ${IMAGES:+--images "$IMAGES"} 2>&1 | tee "$out/$phase.log"
  echo "== $phase ended with status ${PIPESTATUS[0]} after $SECONDS s in all"
done
"${PYTHON:-python3}" "$root/experiments/gpu/report.py" "$out" > "$out/README.md" && cat "$out/README.md"
