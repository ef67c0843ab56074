"""Recovery tuning: the story of `sp3llm recover`, its engine and its teacher."""
