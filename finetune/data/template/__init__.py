"""Conversations to tokens and loss weights, by a chat template that runs in a sandbox."""
