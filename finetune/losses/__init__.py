"""What a step minimises: hidden states in, a sum and a count out; the loop normalises once, by the global count."""
