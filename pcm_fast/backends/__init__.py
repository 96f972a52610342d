"""Fast decoders, one module each."""
