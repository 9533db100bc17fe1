"""What a run will need, by arithmetic alone: no model is built, nothing is downloaded."""
