"""Continue the same prompt with several models, in plain transformers: nothing of sp3llm is used.

python eval/checks/continue_prompt.py DENSE COMPRESSED --prompt "It was a cold evening"
"""

import argparse
import sys

PROMPTS = [
    "It was a cold evening, and the old man",
    "Return a new list containing",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="model folders or hub ids")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens (default: 48)")
    options = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    assert "sp3llm" not in sys.modules
    loaded = {
        name: (AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name))
        for name in options.models
    }
    for prompt in options.prompt or PROMPTS:
        print(f"\nPrompt: {prompt}")
        for name, (tokenizer, model) in loaded.items():
            inputs = tokenizer(prompt, return_tensors="pt")
            torch.manual_seed(0)
            ids = model.generate(
                **inputs,
                max_new_tokens=options.tokens,
                do_sample=True,
                top_k=20,
                temperature=0.7,
                repetition_penalty=1.1,
                pad_token_id=model.config.eos_token_id,
            )
            count = model.num_parameters()
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            print(f"\n  {name} ({count:,} parameters):\n    {' '.join(text.split())}")


if __name__ == "__main__":
    main()
