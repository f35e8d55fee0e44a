"""From a dataclass to its options, TOML keys and documentation."""
