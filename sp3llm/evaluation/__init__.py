"""How good and how fast: perplexity, lm-eval, paired differences, speed."""
