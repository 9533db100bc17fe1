"""Many runs of one config: which ones, one after another, and what came of them."""
