"""The engine: requests in, tokens out; K prompt branches of many requests as rows of one batch."""
