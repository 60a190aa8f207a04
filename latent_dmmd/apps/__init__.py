"""Things to look at: a page, a film."""
