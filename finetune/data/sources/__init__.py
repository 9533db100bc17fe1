"""Sources of rows: what a path names, and its undecoded rows with their places."""
