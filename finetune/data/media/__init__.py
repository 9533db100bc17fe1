"""Pictures, sounds and videos of rows: read safely, measured in tokens, and made into what a model's towers read."""
