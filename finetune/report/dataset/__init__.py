"""The report of `finetune data` on a dataset."""
