"""Trainers: weights that keep what decoding showed, task after task."""
