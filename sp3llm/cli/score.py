"""`sp3llm score`."""

from sp3llm.options import ScoreConfig

SETTINGS = ScoreConfig
SUMMARY = "score a model on lm-eval's tasks, and against the dense one"
DESCRIPTION = """\
Score a model on tasks of lm-eval, and against the dense model with the standard
error of the paired difference."""
EPILOG = """examples:
  sp3llm score ./small --against ./dense --tasks zero-shot
  sp3llm score ./small --against ./dense --tasks papers,wikitext-token,gsm8k --batch-size 16
  sp3llm score ./small --against ./dense --tasks stdlib    needs no network
  accelerate launch -m sp3llm score ./small --tasks mmlu --num-fewshot 5
"""


def run(settings: ScoreConfig) -> None:
    """Scores; the first of several processes shows what it found."""
    from rich.console import Console

    from sp3llm.evaluation.harness import is_first_process, score

    score(settings, Console(quiet=not is_first_process()))
