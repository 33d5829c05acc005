"""All that is Slurm's: plugin, hooks, client commands."""
