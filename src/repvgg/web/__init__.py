"""Pages: the pieces of HTML that reports share, and the app that runs a model in the browser."""
