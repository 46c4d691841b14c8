"""The device: precision, memory, several processes, compiled models."""
