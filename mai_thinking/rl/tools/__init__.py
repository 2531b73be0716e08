"""Tools that a policy may call. MAI-Thinking-1 report §3.3."""
