"""Small services that import nothing of ours: errors, console, arguments, files, heap, machine, plotting."""
