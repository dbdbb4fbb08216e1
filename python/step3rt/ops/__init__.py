"""One operation per module: its torch reference and its CUDA launcher. Imports nothing itself."""
