"""Print the oldest release of each requirement of the installed sp3llm, one pip line each."""

from importlib.metadata import requires

for requirement in requires("sp3llm") or []:
    need, _, extra = requirement.partition(";")
    # `all` repeats the other extras; ruff checks the code's form, which no floor changes.
    if "all" not in extra and not need.startswith("ruff"):
        print(need.strip().replace(">=", "=="))
