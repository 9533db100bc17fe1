"""Typed, composed, validated settings: `load_config("lora.yaml", ["train.max_steps=10"])`."""
