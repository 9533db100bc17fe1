"""The embedded engine: continuous batching of several adapters over one base, with paged keys and values."""
