"""Train one config with many settings."""
