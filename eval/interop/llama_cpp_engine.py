"""What llama.cpp makes of a GGUF file: run by the interpreter that has xllamacpp.

    python llama_cpp_engine.py MODEL.gguf PROMPTS.json

Prompts are lists of token ids. Prints a line of JSON: tokens a second of prefill and of decoding,
by the clock of llama.cpp, a prompt at a time.
"""

import json
import os
import sys
from pathlib import Path

_NEW_TOKENS = 64


def main() -> None:
    import xllamacpp  # here: what runs the tests, which import this file, has none

    model, prompts = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)
    asked = {"n_predict": _NEW_TOKENS, "max_tokens": _NEW_TOKENS, "temperature": 0}
    asked |= {"ignore_eos": True, "cache_prompt": False}
    found = []
    for prompt in json.loads(Path(prompts).read_text()):
        found.append(server.handle_completions({"prompt": prompt, **asked})["timings"])
    rows = found[1:]  # the first one warms up
    speeds = {
        "prefill": [timings["prompt_per_second"] for timings in rows],
        "decoding": [timings["predicted_per_second"] for timings in rows],
    }
    print("\n" + json.dumps(speeds), flush=True)


if __name__ == "__main__":
    main()
