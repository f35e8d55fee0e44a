"""A stream of tasks: what tasks are, who learns them how, and the folder it is written to."""
