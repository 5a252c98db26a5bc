"""What a run says about itself: metrics, where they go, times, and the run directory."""
