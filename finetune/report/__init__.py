"""What a run shows afterwards: one page from its folder, and several runs beside one another."""
