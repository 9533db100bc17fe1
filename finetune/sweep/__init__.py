"""Training with many settings."""
