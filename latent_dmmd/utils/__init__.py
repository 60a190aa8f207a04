"""What every other module may use and what knows nothing of the method."""
