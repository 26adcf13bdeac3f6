"""Reports of `tilewise verify` that users sent in."""
