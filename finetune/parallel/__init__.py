"""The ranks of a run: how they start, share a frozen base, stay in step, and notice that one of them is gone."""
