"""What a step minimizes: hidden states in, a sum and a count out; the loop normalizes once, by the global count."""
