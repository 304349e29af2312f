"""Who computes what and sends what when: each schedule one file, a twin of `reference.single` with its messages."""
