"""The benchmark of continual learning: other strategies, told apart on the same tasks."""
