"""The Hugging Face drop-in. Importing this package does not import transformers."""
