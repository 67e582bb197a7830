#!/bin/bash
# The matrix of `python -m repro matrix` with vLLM on one host with 8 GPUs: which of layout, kernel backends and kernel
# cache makes the start of vllm#41862 stall. Written from the documentation; NOT RUN by this project, which has no such
# host. Check the flags with `vllm serve --help=all` first: --gdn-prefill-backend and --moe-backend as of vLLM 0.20.
#
#   bash matrix.sh [SECONDS]     how long a start may take before its processes are ended (default 1800)
#
# For every start: RESULTS/NAME.log with a time on each line, NAME.stacks (py-spy, if it is there) when it did not come
# up, and a line of RESULTS/summary.tsv. Each cold start has empty caches; its warm twin finds what the cold one left.
set -u
LIMIT=${1:-1800}
MODEL=${MODEL:-Qwen/Qwen3.5-397B-A17B-FP8}
PORT=${PORT:-8123}
RESULTS=${RESULTS:-matrix-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
printf 'layout\tgdn\tmoe\tcache\tup\tseconds\n' > "$RESULTS/summary.tsv"

COMMON=(--trust-remote-code --language-model-only --gpu-memory-utilization 0.90 --max-model-len 32768 --port "$PORT")
TP8=(--tensor-parallel-size 8)
DP8EP8=(--data-parallel-size 8 --enable-expert-parallel)  # the report's first command; its second adds --enforce-eager

start() {  # layout gdn moe cache
  local name="$1-$2-$3-$4" layout=("${TP8[@]}") caches="$RESULTS/caches-$1-$2-$3" begun=$SECONDS up=no
  [ "$1" = dp8ep8 ] && layout=("${DP8EP8[@]}")
  [ "$1" = dp8ep8eager ] && layout=("${DP8EP8[@]}" --enforce-eager)
  [ "$4" = cold ] && rm -rf "$caches"
  mkdir -p "$caches"
  # Lines that vLLM logs "once" come from local rank 0 alone: that others do not print them means nothing.
  FLASHINFER_WORKSPACE_BASE="$caches" TRITON_CACHE_DIR="$caches/triton" TORCHINDUCTOR_CACHE_DIR="$caches/inductor" \
  TORCH_EXTENSIONS_DIR="$caches/extensions" VLLM_CACHE_ROOT="$caches/vllm" \
  VLLM_USE_DEEP_GEMM=0 VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_LOGGING_LEVEL=DEBUG \
  setsid vllm serve "$MODEL" "${layout[@]}" --gdn-prefill-backend "$2" --moe-backend "$3" "${COMMON[@]}" \
    > >(while IFS= read -r line; do printf '%(%H:%M:%S)T %s\n' -1 "$line"; done > "$RESULTS/$name.log") 2>&1 &
  local group=$!
  while kill -0 "$group" 2>/dev/null && [ $((SECONDS - begun)) -lt "$LIMIT" ]; do
    if curl -sf "http://127.0.0.1:$PORT/health" > /dev/null; then up=yes; break; fi
    # Which processes compile, and which lock files exist: no log line shows either.
    { date -u +%H:%M:%S; pgrep -ag "$group" 'nvcc|cicc|ninja|ptxas' | cut -c1-160 | head -5
      find "$caches" -name '*.lock' -o -name lock; } >> "$RESULTS/$name.builds" 2> /dev/null
    sleep 5
  done
  if [ "$up" = no ] && command -v py-spy > /dev/null; then
    for pid in $(pgrep -g "$group"); do echo "== $pid"; py-spy dump --pid "$pid"; done > "$RESULTS/$name.stacks" 2>&1
  fi
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$up" $((SECONDS - begun)) | tee -a "$RESULTS/summary.tsv"
  kill -TERM -- "-$group" 2>/dev/null
  sleep 15
  kill -KILL -- "-$group" 2>/dev/null
  wait "$group" 2>/dev/null
}

for layout in tp8 dp8ep8 dp8ep8eager; do
  for gdn in triton flashinfer; do
    for moe in triton flashinfer_cutlass; do
      for cache in cold warm; do
        start "$layout" "$gdn" "$moe" "$cache"
      done
    done
  done
done
