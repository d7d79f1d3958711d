"""The command line: `sgld generate`, `sgld info`, `sgld version`."""
