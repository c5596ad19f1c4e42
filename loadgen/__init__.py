"""servefit's measuring instrument: drives an OpenAI-compatible server, records what came back."""
