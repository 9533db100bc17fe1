"""Which layer is stored in how many bits: what each costs in agreement with the 16-bit model, and the best choice."""
