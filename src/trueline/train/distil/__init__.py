"""Inverse-Q*: the policy of a decoding method moves into the weights."""
