"""What is written to disk and read back: graphs as data, packed codes."""
