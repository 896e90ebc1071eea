"""The families of models, one folder each: what a family is, how it is converted, proven and trained."""
