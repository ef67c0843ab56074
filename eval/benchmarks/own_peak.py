"""What peers' scripts, which know no sp3llm, say of their memory."""

from pathlib import Path


def peak_memory() -> int:
    """Largest resident set of this process, bytes, on Linux; what `getrusage` says there may be
    that of the process which started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
