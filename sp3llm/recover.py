"""`python -m sp3llm.recover`, and `accelerate launch -m sp3llm.recover`.

The story is `sp3llm.recovery.story`.
"""

from sp3llm.cli import main

if __name__ == "__main__":
    main(prefix=["recover"])
