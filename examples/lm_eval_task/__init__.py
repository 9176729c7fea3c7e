"""Tasks of lm-eval that run offline; docs/quality.md has the command."""
