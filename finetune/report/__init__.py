"""HTML pages: of one run, of several runs side by side, of a sweep, and of a dataset."""
