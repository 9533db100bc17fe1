"""What `finetune data` shows of a dataset."""
