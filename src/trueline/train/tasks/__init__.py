"""Tasks with labels: their files, prompts, families of models, training and scores."""
