"""What responses, rewards and lengths say about a run: pure functions of recorded values."""
