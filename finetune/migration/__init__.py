"""Write the config of a run from the config of another framework."""
