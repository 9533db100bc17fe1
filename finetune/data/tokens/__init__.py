"""Rows to tokens on disk: encoded in parallel, once, and mapped into memory."""
