"""The continual-learning benchmark of the O-LoRA paper: task families, sources, strategies, R."""
