"""Tokenized rows: encoded by worker processes, kept on disk, found again by a fingerprint."""
