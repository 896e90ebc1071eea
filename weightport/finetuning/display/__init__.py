"""What a run shows: a live line, a few answers, a page with everything."""
