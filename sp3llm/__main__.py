"""`python -m sp3llm`, and `accelerate launch -m sp3llm`."""

from sp3llm.cli import main

if __name__ == "__main__":
    main()
