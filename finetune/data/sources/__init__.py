"""Sources of rows: find the files of a path, and read their rows, not decoded, with their locations."""
