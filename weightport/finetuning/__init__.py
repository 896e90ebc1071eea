"""Fine-tuning converted models: recipes, data, one trainer for every family, metrics on generations."""
