"""Files, folders and the hub to undecoded rows, each with its place."""
