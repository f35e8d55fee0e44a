"""Checkpoints, tokenizers and chat templates: the only users of them."""
