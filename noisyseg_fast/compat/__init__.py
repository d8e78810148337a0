"""What other packages expect to be given. Each module imports its package; nothing else here does."""
