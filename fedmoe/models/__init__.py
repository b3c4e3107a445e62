"""The model families. Each has its `NAMES` and `make(name, shape, classes)`, which gives (extractor, header)."""
