"""`opticnerve serve`: an OpenAI-compatible API for one model on one machine. docs/serving.md is its page.

`server` puts it together; `app` knows HTTP, `scheduler` and `batch` know the model, and nothing in between knows both.
"""
