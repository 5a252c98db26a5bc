"""Policy weights -> rollout engine: versioned, complete, verified."""
