"""Where the bytes of entries live."""
