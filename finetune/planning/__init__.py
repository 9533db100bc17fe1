"""Plan a run: memory, operations and time from shapes and config. No model is built, nothing is downloaded."""
