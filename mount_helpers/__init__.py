"""Linux mounting in plain Python: system calls, namespaces, probes. Knows nothing of what is above it."""
