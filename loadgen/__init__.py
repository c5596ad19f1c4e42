"""servefit's measuring instrument: drives an OpenAI-compatible server and records what came back."""
