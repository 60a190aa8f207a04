"""Scores of generated images, of edits and of autoencoders."""
