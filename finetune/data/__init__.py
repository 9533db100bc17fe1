"""From files of rows to batches of tokens with a mask: formats -> chat -> loader -> packing -> batch."""
