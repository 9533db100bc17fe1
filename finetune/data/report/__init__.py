"""What `finetune data` says about rows."""
