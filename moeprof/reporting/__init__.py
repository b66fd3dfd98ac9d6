"""Results as pages: HTML, Markdown and JSON."""
