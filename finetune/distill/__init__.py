"""The teacher: what it says about a batch's target tokens, and where that is kept."""
