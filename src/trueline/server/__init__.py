"""The methods behind an OpenAI-compatible HTTP server."""
