"""One file a command of `finetune`."""
