"""The only package that knows vLLM: connector shells, scheduler side, worker side, live model, version check."""
