"""What a mask costs: `python -m benchmarks`, from the root."""
