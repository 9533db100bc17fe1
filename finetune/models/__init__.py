"""The base model, its quantization and its adapter, as ordinary transformers, bitsandbytes and PEFT objects."""
