"""Who leaves a bounded tier, when, and why."""
