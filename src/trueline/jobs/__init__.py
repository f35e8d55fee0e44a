"""Jobs: one function each, from a config and a folder to results."""
