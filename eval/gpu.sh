#!/usr/bin/env bash
# Everything that needs a GPU, in at most nine minutes, without network.
#
#     eval/gpu.sh             on a machine with a GPU: into eval/results/gpu-<card>/
#     eval/gpu.sh --dry-run   every step at tiny shapes on the CPU, into a temporary folder
#
# PYTHON names the interpreter (python3), which needs torch, transformers, accelerate, peft,
# safetensors and rich. A step that fails or takes too long is told of in steps.md, and the next
# one starts. The caps add up to nine minutes.
set -euo pipefail
words="eval/gpu.sh $*"
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
export HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
# Named from here, so that no path of this machine gets into a result.
work=.gpu
rm -rf "$work"
mkdir "$work"
trap 'rm -rf "$work"' EXIT

if [[ ${1:-} == --dry-run ]]; then
    card="none (dry run)" results=$(mktemp -d) device=cpu
    tests='not gpu and not slow'
    small=(--shape tiny --samples 24 --seq-len 64)
    layers=(2 4)
    large=(--shape tiny --layers 1 --samples 24 --seq-len 64)
    places=(host disk)
    pair=(--hidden-size 64 --intermediate-size 128 --layers 2 --heads 4 --vocab-size 4096)
    recovery=(--steps 2 --batch 2 --seq-len 32)
    prompts=(--batch-sizes 1 2 --prompt-lengths 16 --new-tokens 4 --repeats 1)
else
    device=cuda
    card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())')
    results=eval/results/gpu-$(tr -cs '[:alnum:]\n' - <<<"${card,,}" | sed 's/^nvidia-//; s/-$//')
    tests=gpu
    small=(--shape llama-2-7b --samples 128 --seq-len 2048)
    layers=(4 16)
    large=(--shape llama-2-70b --layers 1 --samples 128 --seq-len 2048)
    places=(gpu host)
    pair=(--hidden-size 4096 --intermediate-size 11008 --layers 4 --heads 32 --vocab-size 32000)
    recovery=(--steps 10 --batch 8 --seq-len 1024)
    prompts=(--batch-sizes 1 8 --prompt-lengths 512 2048 --new-tokens 32 --repeats 3)
fi
export TMPDIR=$PWD/$work
mkdir -p "$results"
rm -f "$results"/*.failed.txt
"$python" - "$card" "$words" >"$results/steps.md" <<'END'
import sys
from sp3llm.runtime.machine import versions
print(f"# {sys.argv[1]}\n\n    {sys.argv[2].strip()}\n")
print(", ".join(f"{name} {version}" for name, version in versions().items()))
print("\n| step | seconds | how it ended |\n|---|---|---|")
END

# step NAME SECONDS COMMAND...: run a command for so long at most, and write down how it ended.
step() {
    local name=$1 most=$2 code=0 began=$SECONDS ended=well
    shift 2
    echo "== $name, $most s at most"
    timeout --kill-after=5 "$most" "$@" >"$work/log" 2>&1 || code=$?
    tail -n 25 "$work/log"
    case $code in 0) ;; 124 | 137) ended="stopped after $most s" ;; *) ended="FAILED ($code)" ;; esac
    echo "| $name | $((SECONDS - began)) | $ended |" >>"$results/steps.md"
    if ((code)); then
        tail -n 40 "$work/log" | sed "s#$PWD/##g" >"$results/$name.failed.txt"
    fi
}

default='gradient, search (the default)'
compress=("$python" eval/benchmarks/bench_compress.py --results "$results" --device "$device")
step tests 123 "$python" -m pytest tests/test_gpu.py -m "$tests" -p no:cacheprovider
tail -n 1 "$work/log" | sed 's/^/\n    tests: /' >"$work/tests"
step "7b-streams-${places[0]}" 165 "${compress[@]}" --name "7b-streams-${places[0]}" \
    "${small[@]}" --layers "${layers[@]}" --streams "${places[0]}" --only "$default"
rm -rf "$work"/llama-*
step 70b-layer 92 "${compress[@]}" --name 70b-layer "${large[@]}" --only 'gradient, width'
rm -rf "$work"/llama-*
step "7b-streams-${places[1]}" 70 "${compress[@]}" --name "7b-streams-${places[1]}" \
    "${small[@]}" --layers 2 --streams "${places[1]}" --only "$default"
rm -rf "$work"/llama-* "$work"/tiny-*
step pair 25 "$python" eval/benchmarks/random_pair.py "$work/pair" "${pair[@]}" \
    --dtype bfloat16 --device "$device" --tokenizer
step recovery 35 "$python" eval/benchmarks/recovery_speed.py --pair "$work/pair" \
    --results "$results" --name recovery "${recovery[@]}" --device "$device"
step speed 30 "$python" -m sp3llm bench "$work/pair/small" --against "$work/pair/dense" \
    "${prompts[@]}" --dtype bfloat16 --device "$device" --output "$results/speed.json"
cat "$work/tests" >>"$results/steps.md"
cat "$results/steps.md"
echo "Results: $results"
