"""`sp3llm score`."""

from sp3llm.options import ScoreConfig

SETTINGS = ScoreConfig
SUMMARY = "score a model on tasks, and against the dense one"
DESCRIPTION = """\
Score a decoder on tasks of lm-eval, or an encoder on the task that it was
fine-tuned on, and against the dense model with the standard error of the paired
difference."""
EPILOG = """examples:
  sp3llm score ./small --against ./dense --tasks zero-shot
  sp3llm score ./small --against ./dense --tasks papers,wikitext-token,gsm8k --batch-size 16
  sp3llm score ./small --against ./dense --tasks stdlib    needs no network
  sp3llm score ./small --against ./bert-sst2 --task sst2
  accelerate launch -m sp3llm score ./small --tasks mmlu --num-fewshot 5
"""


def run(settings: ScoreConfig) -> None:
    """Scores; the first of several processes shows what it found."""
    from rich.console import Console

    if settings.task is not None:
        from sp3llm.evaluation.score_task import score_task

        with Console().status("importing torch and transformers"):
            import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        score_task(settings, Console())
        return
    from sp3llm.evaluation.harness import is_first_process, score

    score(settings, Console(quiet=not is_first_process()))
