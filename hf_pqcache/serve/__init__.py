"""An OpenAI-compatible HTTP server over transformers' continuous batching; knows no command and no measurement."""
