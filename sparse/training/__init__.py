"""Keep a model sparse while it trains: masks, hooks, checkpoints, ranks."""
