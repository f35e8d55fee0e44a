"""Everything that is written and comes back after a kill."""
