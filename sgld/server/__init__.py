"""The HTTP server: `sgld serve`."""
