"""What to reuse. Pure Python: neither torch nor vLLM is imported below this package."""
