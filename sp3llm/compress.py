"""`python -m sp3llm.compress`, and `accelerate launch -m sp3llm.compress`.

The story is `sp3llm.compression.story`.
"""

from sp3llm.cli import main

if __name__ == "__main__":
    main(prefix=["compress"])
