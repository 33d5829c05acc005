"""Environments, instances, the daemon and login, deployment and Slurm: the command `sdee`."""
