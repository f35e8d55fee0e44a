"""The back end on vLLM: a request's branches are engine requests that go in lock step."""
