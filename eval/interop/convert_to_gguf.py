"""Run llama.cpp's own converter, which is told by another model what it splits text by.

    python convert_to_gguf.py LLAMA_CPP DENSE MODEL --outtype q8_0 --outfile FILE

LLAMA_CPP is its source. The converter knows byte-level pre-tokenizers by a hash of the ids that a
sentence becomes, which are others where a vocabulary was cut: it looks at those of the dense model
in the folder DENSE (docs/deploy.md). Imports nothing of ours, for the environments of tools.
"""

import sys


def main() -> None:
    source, dense = sys.argv[1:3]
    del sys.argv[1:3]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from transformers import AutoTokenizer

    tokenizer, recognised = AutoTokenizer.from_pretrained(dense), TextModel.get_vocab_base_pre
    TextModel.get_vocab_base_pre = lambda self, _: recognised(self, tokenizer)
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
