"""Write a Llama of random weights and one of its compressed shape, for measuring speed.

python eval/benchmarks/random_pair.py pair --hidden-size 1024 --intermediate-size 2816 \
    --layers 8 --heads 16 --keep 0.75
sp3llm bench pair/small --against pair/dense

The shapes of Llama-2-7B, on a GPU: --hidden-size 4096 --intermediate-size 11008 --layers 32
--heads 32 --vocab-size 32000 --dtype bfloat16 --device cuda.
"""

import argparse
from pathlib import Path

import torch
from random_models import write_random_model
from transformers import LlamaConfig

from sp3llm.models.families import family_of
from sp3llm.models.shapes import resized_config
from sp3llm.options import DTYPES
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for dense and small")
    for option, default in (
        ("hidden-size", 1024),
        ("intermediate-size", 2816),
        ("layers", 8),
        ("heads", 16),
        ("vocab-size", 8192),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N")
    parser.add_argument(
        "--keep", type=float, default=0.75, help="of the parameters, by width alone"
    )
    parser.add_argument("--dtype", default="float32", choices=[d for d in DTYPES if d != "auto"])
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    parser.add_argument("--tokenizer", action="store_true", help="with the bundled tokenizer")
    options = parser.parse_args()
    dense = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=options.dtype,
    ).to_dict()
    family = family_of(dense)
    shape = candidates(family, dense, Limits(keep=options.keep, only_width=True))[0]
    small = resized_config(family, dense, shape)
    dtype = getattr(torch, options.dtype)
    counts = [
        write_random_model(options.out / name, config, dtype, options.device, options.tokenizer)
        for name, config in (("dense", dense), ("small", small))
    ]
    print(f"{counts[0]:,} and {counts[1]:,} parameters ({100 * counts[1] / counts[0]:.2f} %)")


if __name__ == "__main__":
    main()
