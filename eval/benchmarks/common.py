"""What the scripts of this folder share."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def place(name: str) -> Path:
    """Where the results of that name go, without a suffix: where those of an earlier run lie, else
    into the folder that the name begins with (`curve/mine`), else into one called like it.
    """
    earlier = sorted(RESULTS.rglob(f"{name}.json"))
    if earlier:
        return earlier[0].with_suffix("")
    return RESULTS / name if "/" in name else RESULTS / name / name
