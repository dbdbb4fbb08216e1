"""One file per operation: the torch reference beside the CUDA launcher."""
