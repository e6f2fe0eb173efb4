"""What travels with a model that hears: the numbers of its features, its tokens, and the files that say so."""
