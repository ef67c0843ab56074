"""Few bits: the story of `sp3llm quantize`, and bitsandbytes."""
