"""`sp3llm bench`."""

import os

from sp3llm.options import BenchConfig

SETTINGS = BenchConfig
SUMMARY = "measure speed and memory against the dense model"
DESCRIPTION = """\
Measure prefill and decode speed, time to first token and memory of a compressed
model and its dense one in turns, beside what their FLOPs and bytes promise."""
EPILOG = None


def run(settings: BenchConfig) -> None:
    """Measures both models and shows the figures."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells when it starts
    from rich.console import Console

    console = Console()
    with console.status("importing torch and transformers"):
        import transformers

        from sp3llm.evaluation.speed import bench

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench(settings, console)
