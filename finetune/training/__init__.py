"""One run: recipe assembles it, loop runs it, checkpoint keeps it, track shows it."""
