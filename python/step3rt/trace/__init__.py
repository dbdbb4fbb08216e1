"""What an AFD deployment's GPUs did when: recordings, one timeline of them all, and its summary."""
