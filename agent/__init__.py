"""servefit's observer and judge: what a server and its GPUs did, and whether they fit the load."""

__version__ = "0.1.0"
