"""Teachers: the targets they give for batches, and the cache of these targets."""
