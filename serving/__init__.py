"""The chat server: a queue with one generation thread, and an OpenAI-compatible endpoint in front of it."""
