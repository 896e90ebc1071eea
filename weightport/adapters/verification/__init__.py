"""A merged model against its base with the adapters active, in memory."""
