"""The base model, its quantization and its adapter, as transformers, bitsandbytes and PEFT objects."""
