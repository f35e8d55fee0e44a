"""Ways to keep what came before, one file each, under any trainer of the Trainer family."""
