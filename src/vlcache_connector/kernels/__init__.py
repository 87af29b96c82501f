"""The operations of `csrc/`: schemas and wrappers, and plain-PyTorch twins that are used where nothing was compiled."""
