"""Small services that import nothing of ours: errors, console, arguments, files, machine, plotting."""
