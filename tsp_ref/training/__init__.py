"""From text to a trained model: data, optimizer, the loop, and the digest of every bit it made."""
