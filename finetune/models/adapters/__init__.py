"""LoRA and its kinds."""
