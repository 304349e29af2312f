"""The process that a rank runs in: how it starts and ends, its threads, its memory, its terminal."""
