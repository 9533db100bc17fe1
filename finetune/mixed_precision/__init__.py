"""Which layer is stored in how many bits."""
