"""From a budget to a shape: limits, candidates, search, and what a run will need."""
